#!/usr/bin/env python3
"""Time `serenity-slab build` against a plain O_DIRECT copy of the same number of bytes, in turns, in one run.

    python3 scripts/bench_slab_build.py SERENITY_SLAB MODEL OUTPUT_FOLDER [--repeats 3]

The copy reads every byte of MODEL/transformer/*.safetensors and writes as many bytes as slab and companion have, past the page cache:
once with reads and writes in turns (what `dd` does), once with a reader and a writer at the same time (the best that a copy can do). Before
each run the cached pages of the input are dropped. Printed: bytes a second of every run (input plus output bytes), the medians, the ratio of
the build to both copies, and the build's peak resident memory. No packages needed.
"""
import argparse
import glob
import json
import mmap
import os
import queue
import statistics
import sys
import threading
import time

PIECE = 16 << 20
ALIGN = 4096


def drop(files):
    for file in files:
        fd = os.open(file, os.O_RDONLY)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


class Writer:
    """Writes a share of every piece read, so that both ends come out even."""

    def __init__(self, path, total_in, total_out):
        self.fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_DIRECT)
        self.share, self.total, self.due, self.at = total_out / total_in, total_out, 0.0, 0

    def write(self, buffer, count):
        self.due += count * self.share
        now = min(int(self.due - self.at) // ALIGN * ALIGN, len(buffer))
        if now:
            self.at += os.pwrite(self.fd, memoryview(buffer)[:now], self.at)

    def close(self):
        os.fsync(self.fd)
        os.close(self.fd)


def read_all(files, buffers, each):
    for file in files:
        fd = os.open(file, os.O_RDONLY | os.O_DIRECT)
        size, at = os.fstat(fd).st_size, 0
        while at < size:
            buffer = buffers.get()
            count = os.preadv(fd, [buffer], at)
            at += count
            each(buffer, count)
        os.close(fd)


def copy(files, total_in, total_out, path, overlapped):
    drop(files)
    buffers, work = queue.Queue(), queue.Queue()
    for _ in range(4 if overlapped else 1):
        buffers.put(mmap.mmap(-1, PIECE))
    writer = Writer(path, total_in, total_out)
    started = time.perf_counter()
    if overlapped:
        def write_all():
            while (item := work.get()) is not None:
                writer.write(*item)
                buffers.put(item[0])
        thread = threading.Thread(target=write_all)
        thread.start()
        read_all(files, buffers, lambda buffer, count: work.put((buffer, count)))
        work.put(None)
        thread.join()
    else:
        def one(buffer, count):
            writer.write(buffer, count)
            buffers.put(buffer)
        read_all(files, buffers, one)
    writer.close()
    seconds = time.perf_counter() - started
    os.unlink(path)
    return seconds


def build(args, files, prefix):
    """Wall time, peak resident bytes, bytes written."""
    drop(files)
    started = time.perf_counter()
    pid = os.posix_spawn(args.serenity_slab, [args.serenity_slab, "build", "--model", args.model, "--output", prefix], os.environ,
                         file_actions=[(os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0)])
    _, status, usage = os.wait4(pid, 0)
    seconds = time.perf_counter() - started
    if status:
        sys.exit("the build failed")
    outputs = [prefix + ending for ending in (".safetensors", ".other.safetensors", ".manifest.json")]
    written = sum(os.path.getsize(p) for p in outputs)
    for path in outputs:
        os.unlink(path)
    return seconds, usage.ru_maxrss * 1024, written, usage.ru_utime + usage.ru_stime


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("serenity_slab")
    parser.add_argument("model")
    parser.add_argument("output")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    files = sorted(glob.glob(os.path.join(args.model, "transformer", "*.safetensors")))
    total_in = sum(map(os.path.getsize, files))
    os.makedirs(args.output, exist_ok=True)
    prefix, target = os.path.join(args.output, "bench-slab"), os.path.join(args.output, "bench-copy")
    _, _, total_out, _ = build(args, files, prefix)  # Warms the code, finds the output's size.
    runs = {"copy, in turns": [], "copy, overlapped": [], "build": []}
    peak = cpu = 0
    for _ in range(args.repeats):
        runs["copy, in turns"].append(copy(files, total_in, total_out, target, False))
        seconds, resident, _, used = build(args, files, prefix)
        runs["build"].append(seconds)
        peak, cpu = max(peak, resident), max(cpu, used)
        runs["copy, overlapped"].append(copy(files, total_in, total_out, target, True))
    moved = total_in + total_out
    print(f"{total_in} bytes in, {total_out} bytes out, {args.repeats} repeats in turns, {os.cpu_count()} processors")
    for name, seconds in runs.items():
        median = statistics.median(seconds)
        print(f"{name:<17} {moved / median / 1e6:7.0f} MB/s  median {median:.2f} s of {', '.join(f'{s:.2f}' for s in seconds)}")
    ratio = {k: statistics.median(c / b for c, b in zip(runs[k], runs["build"])) for k in runs if k != "build"}
    print(f"build / copy, medians of pairs: {ratio['copy, in turns']:.2f} in turns, {ratio['copy, overlapped']:.2f} overlapped; "
          f"processor time of a build {cpu:.1f} s, peak memory {peak / 2**20:.0f} MiB")
    print(json.dumps({"bytes_in": total_in, "bytes_out": total_out, "runs_s": runs, "ratios": ratio, "peak_rss_bytes": peak}))


if __name__ == "__main__":
    main()
