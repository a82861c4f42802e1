#!/usr/bin/env python3
"""Whole training runs on a GPU through all processes, compared byte for byte.

    scripts/gpu-check.sh processes [--bin DIR] [--work DIR] [--device cuda] [--steps 20] [--kill-steps 100] [--kills 5] [--only NAME...]

DIR of --bin holds the programs (default target/release). Sections (--only):
  parity  `serenity-trainer parity` on the device against the reference's files, float32
  same    a model of an eighth of dev's width: twice the same; streamed, resident, every pool, both payload forms, less device memory
  damage  bits flipped in the ring under a run: noticed, and never trained on
  kills   the same model in as little device memory as it takes, so that every block streams: loader killed 2 x KILLS times, trainer KILLS times,
          each run with the bytes of an undisturbed one
Also checked: the driver's figure stays below the cap and does not grow after step 5, and the first loss is the processor's.
Prints a line for each verdict. Exit 1 if one failed.
"""
import argparse, array, copy, hashlib, json, os, random, re, shutil, signal, subprocess, sys, time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
failed = 0


def verdict(ok, what, note=""):
    global failed
    failed += not ok
    print(f"{'ok  ' if ok else 'FAIL'} {what:<58} {note}", flush=True)


def merge(value, change):
    for key, new in change.items():
        if isinstance(new, dict) and isinstance(value.get(key), dict):
            merge(value[key], new)
        else:
            value[key] = new
    return value


class Lab:
    def __init__(self, args):
        self.bin, self.work, self.device = Path(args.bin).resolve(), Path(args.work).resolve(), args.device
        shutil.rmtree(self.work, ignore_errors=True)
        self.work.mkdir(parents=True)
        self.base = json.loads((ROOT / "examples/quickstart/config.json").read_text())

    def program(self, name, *args):
        done = subprocess.run([self.bin / name, *map(str, args)], cwd=ROOT, capture_output=True, text=True, timeout=300)
        if done.returncode:
            sys.exit(f"error: {name} ended with {done.returncode}\n{done.stderr[-3000:]}")

    def model(self, preset):
        folder = self.work / preset
        if not folder.exists():
            self.program("serenity-slab", "synth", "--preset", preset, "--output", folder / "model")
            self.program("serenity-slab", "build", "--model", folder / "model", "--output", folder / "slab")
        return {
            "model": {"path": str(folder / "model"), "max_sequence_length": 128},
            "data": {"cache_dir": str(folder / "cache")},
            "memory": {"stagehand": {"squareq_slab_path": str(folder / "slab.safetensors"),
                                     "squareq_manifest_path": str(folder / "slab.manifest.json")}},
        }

    def config(self, name, preset, steps, change):
        config = copy.deepcopy(self.base)
        merge(config, self.model(preset))
        merge(config, {"output_dir": str(self.work / "runs" / name), "max_steps": steps, "train_device": self.device,
                       "train_dtype": "bfloat16", "validation": {"samples": 2}, "gradient_accumulation_steps": 2,
                       "checkpoint": {"save_every": 5}})
        merge(config, change)
        path = self.work / f"{name}.json"
        path.write_text(json.dumps(config, indent=1))
        return path

    def start(self, name, preset, steps, change):
        path = self.config(name, preset, steps, change)
        err = open(self.work / f"{name}.err", "w")
        return subprocess.Popen([self.bin / "serenity-launch", path], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=err), path

    def run(self, name, preset, steps, change=None, quiet=False):
        begun = time.time()
        child, _ = self.start(name, preset, steps, change or {})
        return self.result(name, child, steps, begun, quiet)

    def result(self, name, child, steps, begun, quiet=False):
        try:
            code = child.wait(timeout=240)
        except subprocess.TimeoutExpired:
            child.kill()
            code = "no end after 240 s"
        out = self.work / "runs" / name
        run = {"name": name, "code": code, "seconds": time.time() - begun, "hash": None, "log": []}
        if code == 0:
            digest = hashlib.sha256()
            for file in (out / "quickstart.safetensors", out / "checkpoints" / f"step_{steps:06}.safetensors"):
                digest.update(file.read_bytes())
            run["hash"] = digest.hexdigest()[:16]
            run["log"] = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
        elif not quiet:
            for tail in [self.work / f"{name}.err", *sorted(out.glob("logs/*"))]:
                print(f"--- {tail}\n{tail.read_text(errors='replace')[-1500:]}", flush=True)
        return run


def device_memory(run):
    lines = [(l["step"], l["memory_mb"]["device"]) for l in run["log"] if (l.get("memory_mb") or {}).get("device")]
    return lines


def figures(run):
    memory = device_memory(run)
    steps = sorted(l["seconds"] for l in run["log"] if l["step"] > 5 and l.get("seconds"))
    note = f"{run['hash']} in {run['seconds']:.1f} s"
    if steps:
        note += f", step {1e3 * steps[len(steps) // 2]:.1f} ms"
    if memory:
        note += f", driver {max(d['driver'] for _, d in memory):.0f} of {memory[-1][1]['cap']:.0f} MiB"
    return note


def median_step(run):
    steps = sorted(l["seconds"] for l in run["log"] if l["step"] > 5 and l.get("seconds"))
    return steps[len(steps) // 2] if steps else float("nan")


def check_memory(run):
    memory = device_memory(run)
    later = [d["driver"] for step, d in memory if step >= 5]
    verdict(bool(memory) and all(d["driver"] <= d["cap"] for _, d in memory), f"{run['name']}: the driver's figure is below the cap")
    verdict(bool(later) and max(later) <= later[0], f"{run['name']}: no growth after step 5", f"{sorted(set(later))}")


POOL = {"pinned_pool_mb": 64, "ring_chunk_mb": 2, "vram_high_watermark_mb": "auto"}


def stagehand(**keys):
    return {"memory": {"strategy": "stagehand", "stagehand": keys}}


def least_memory(lab, args, first, pool=POOL):
    """The smallest cap that a run accepts, found by one that is refused; and one halfway to keeping everything."""
    memory = device_memory(first)
    if not memory:
        return 20000, 20000
    top, arena = max(d["driver"] for _, d in memory), memory[-1][1]["arena"]
    # The trainer sets 192 MiB aside for libraries, of which `top` has about 100: what is left is less than adapters of this model alone.
    cap = int(top - arena + 200)
    run = lab.run("refused", "eighth", args.steps, stagehand(**{**pool, "vram_high_watermark_mb": cap}), quiet=True)
    said = "".join(f.read_text(errors="replace") for f in [lab.work / "refused.err", *(lab.work / "runs/refused").glob("logs/*")])
    need, have = re.search(r"at least (\d+) MiB", said), re.search(r"found: +(\d+) MiB", said)
    verdict(run["code"] == 64 and bool(need and have), "eighth, far too little memory: refused with the minimum", f"exit {run['code']}")
    minimum = cap + int(need[1]) - int(have[1]) + 1 if need and have else int(top)
    return minimum, int((minimum + top) / 2)


def same(lab, args):
    first = lab.run("streamed", "eighth", args.steps, stagehand(**POOL))
    verdict(first["code"] == 0, "eighth, streamed", figures(first))
    if first["code"] != 0:
        return
    check_memory(first)
    minimum, middle = least_memory(lab, args, first)
    ways = [
        ("again", stagehand(**POOL)),
        ("resident", {"memory": {"strategy": "resident"}}),
        ("two-slots", stagehand(**{**POOL, "pinned_pool_mb": 4})),
        ("whole-slab-in-the-ring", stagehand(**{**POOL, "pinned_pool_mb": 1024, "ring_chunk_mb": 16})),
        ("dequant-cpu", stagehand(**{**POOL, "dequant": "cpu"})),
        ("less-memory", stagehand(**{**POOL, "vram_high_watermark_mb": middle})),
        ("least-memory", stagehand(**{**POOL, "vram_high_watermark_mb": minimum})),
        ("less-memory-dequant-cpu", stagehand(**{**POOL, "vram_high_watermark_mb": middle, "dequant": "cpu"})),
    ]
    for name, change in ways:
        run = lab.run(name, "eighth", args.steps, change)
        verdict(run["hash"] is not None and run["hash"] == first["hash"], f"eighth, {name}: the same bytes", figures(run))
        if run["hash"] and "least" in name:
            check_memory(run)
    other = lab.run("other-seed", "eighth", args.steps, merge(stagehand(**POOL), {"seed": 7}))
    verdict(other["hash"] not in (None, first["hash"]), "eighth, another seed: other bytes", figures(other))
    cpu = lab.run("processor", "eighth", 1, merge(stagehand(pinned_pool_mb=64, ring_chunk_mb=2),
                                                  {"train_device": "cpu", "train_dtype": "float32", "validation": {"samples": 1}}))
    loss = lambda run: next((l["loss"] for l in run["log"] if l["step"] == 1), float("nan"))
    error = abs(loss(first) - loss(cpu)) / abs(loss(cpu))
    verdict(error < 1e-2, "eighth, first loss is the processor's", f"{loss(first):.6f} and {loss(cpu):.6f}")


def tensors(path):
    """float32 tensors of a safetensors file by name."""
    data = Path(path).read_bytes()
    size = int.from_bytes(data[:8], "little")
    found = {}
    for name, entry in json.loads(data[8:8 + size]).items():
        if name != "__metadata__" and entry["dtype"] == "F32":
            begin, end = entry["data_offsets"]
            found[name] = array.array("f", data[8 + size + begin:8 + size + end])
    return found


def parity(lab, args):
    goldens = ROOT / "tests/fixtures/goldens"
    for kind, case in [("forward", "transformer"), ("lora-step", "lora_step")]:
        out, source = lab.work / f"{case}.safetensors", goldens / f"cases/{case}.safetensors"
        lab.program("serenity-trainer", "parity", kind, "--model", goldens / "model", "--case", source, "--out", out, "--device", lab.device)
        ours, theirs = tensors(out), tensors(source)
        worst, where, count = 0.0, "", 0
        for name, values in ours.items():
            if name not in theirs:
                continue
            count += 1
            scale = max(map(abs, theirs[name])) or 1e-30
            usable = len(values) == len(theirs[name]) and all(v == v for v in values)
            error = max(abs(a - b) for a, b in zip(values, theirs[name])) / scale if usable else float("inf")
            if error > worst:
                worst, where = error, name
        verdict(count > 4 and worst <= 1e-4, f"parity {kind} on {lab.device}: {count} tensors", f"worst {worst:.1e} in {where}")


def children(path, program):
    """Process ids of a run's programs of that name."""
    found = set()
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            words = (entry / "cmdline").read_bytes().split(b"\0")
            zombie = (entry / "stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
        except OSError:
            continue
        if not zombie and words[0].decode(errors="replace").endswith(program) and str(path).encode() in words:
            found.add(int(entry.name))
    return found


def last_step(out):
    try:
        lines = (out / "log.jsonl").read_bytes().splitlines()
        return max((json.loads(l)["step"] for l in lines if l.endswith(b"}")), default=0)
    except OSError:
        return 0


def killed(lab, name, program, steps, kills, change):
    begun, done, victims = time.time(), 0, set()
    child, path = lab.start(name, "eighth", steps, change)
    seen, mark = 0, 3
    while child.poll() is None and done < kills and time.time() - begun < 200:
        step = last_step(lab.work / "runs" / name)
        fresh = children(path, program) - victims
        # Progress since the last kill, so that each hits a run that is going on.
        if fresh and step >= mark and step != seen:
            for pid in fresh:
                os.kill(pid, signal.SIGKILL)
            victims |= fresh
            done, seen, mark = done + 1, step, step + 3
        time.sleep(0.002)
    return lab.result(name, child, steps, begun), done


def kills(lab, args):
    first = lab.run("all-memory", "eighth", args.steps, stagehand(**POOL))
    if first["code"] != 0:
        return verdict(False, "eighth, to be killed")
    # With more memory the loader is not missed: blocks stay on the device.
    minimum, _ = least_memory(lab, args, first)
    change = merge(stagehand(**{**POOL, "vram_high_watermark_mb": minimum}), {"checkpoint": {"save_every": 4}, "log_every_steps": 1000})
    steps = args.kill_steps
    reference = lab.run("undisturbed", "eighth", steps, change)
    verdict(reference["code"] == 0, "eighth, undisturbed", figures(reference))
    if reference["code"] != 0:
        return
    for name, program in [("loader-killed", "serenity-loader"), ("loader-killed-again", "serenity-loader"), ("trainer-killed", "serenity-trainer")]:
        run, count = killed(lab, name, program, steps, args.kills, change)
        verdict(count == args.kills and run["hash"] is not None and run["hash"] == reference["hash"],
                f"eighth, {program} killed {count} times: the same bytes", figures(run))
        usual, now = median_step(reference), median_step(run)
        verdict(now <= 1.25 * usual, f"eighth, {name}: as fast between kills", f"step {1e3 * now:.2f} ms, undisturbed {1e3 * usual:.2f} ms")
        numbers = [l["step"] for l in run["log"] if l.get("loss") is not None]
        verdict(numbers == list(range(1, steps + 1)), f"eighth, {name}: each step once in the log")


def ring_of(pid):
    """The ring that a loader has mapped: its largest shared file."""
    paths = {Path(line.split(maxsplit=5)[-1]) for line in Path(f"/proc/{pid}/maps").read_text().splitlines() if " /dev/shm/" in line}
    return max((p for p in paths if p.exists()), key=lambda p: p.stat().st_size, default=None)


def damage(lab, args):
    # The whole model stays in the ring, and as little of it as possible on the device: what is flipped there is neither read from disk again
    # nor overwritten, and it is used in every pass.
    pool = {**POOL, "pinned_pool_mb": 1024}
    roomy = lab.run("roomy", "eighth", 5, stagehand(**pool))
    minimum, _ = least_memory(lab, args, roomy, pool)
    change = stagehand(**{**pool, "vram_high_watermark_mb": minimum})
    steps = 3 * args.steps
    reference = lab.run("undamaged", "eighth", steps, change)
    verdict(reference["code"] == 0, "eighth, undamaged", figures(reference))
    begun, flipped = time.time(), 0
    child, path = lab.start("damaged", "eighth", steps, change)
    while child.poll() is None and not flipped and time.time() - begun < 200:
        for pid in children(path, "serenity-loader") if last_step(lab.work / "runs/damaged") >= 7 else ():
            ring = ring_of(pid)
            if ring is None:
                continue
            with open(ring, "r+b") as file:
                end = file.seek(0, 2)
                for place in random.Random(1).sample(range(1 << 20, end), 2048):
                    file.seek(place)
                    byte = file.read(1)
                    file.seek(place)
                    file.write(bytes([byte[0] ^ 1 << place % 8]))
                    flipped += 1
                print(f"     {flipped} bits flipped in {ring} of {end >> 20} MiB", flush=True)
        time.sleep(0.005)
    run = lab.result("damaged", child, steps, begun, quiet=True)
    said = "".join(f.read_text(errors="replace") for f in [lab.work / "damaged.err", *(lab.work / "runs/damaged").glob("logs/*")])
    noticed = len(re.findall(r"does not have the checksum", said))
    verdict(flipped > 0 and noticed > 0, "eighth, bits flipped in the ring: noticed", f"{flipped} flipped, said {noticed} times")
    right = run["code"] == 70 or (run["hash"] is not None and run["hash"] == reference["hash"])
    verdict(right, "eighth, bits flipped in the ring: not trained on", f"exit {run['code']}, {run['hash']}")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--bin", default=ROOT / "target/release")
    parser.add_argument("--work", default="/dev/shm/serenity-gpu-processes")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--kill-steps", type=int, default=100)
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--only", nargs="*", default=["parity", "same", "damage", "kills"])
    args = parser.parse_args()
    lab = Lab(args)
    begun = time.time()
    for name, section in [("parity", parity), ("same", same), ("damage", damage), ("kills", kills)]:
        if name in args.only:
            section(lab, args)
    print(f"{failed} failed, {time.time() - begun:.0f} s; logs in {lab.work}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
