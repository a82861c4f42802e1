//! Ranges, page hashes, short files: both engines against the bytes that were written.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::fs::File;
use std::os::unix::fs::OpenOptionsExt;
use std::sync::atomic::AtomicU64;

use super::*;
use proptest::prelude::*;

fn slab_file(bytes: &[u8], page_bytes: u64, hashes: bool) -> (tempfile::NamedTempFile, Arc<SlabFile>) {
    let temp = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(temp.path(), bytes).unwrap();
    let file = File::options().read(true).custom_flags(nix::libc::O_DIRECT).open(temp.path()).or_else(|_| File::open(temp.path())).unwrap();
    let hash = |page: &[u8]| AtomicU64::new(if hashes { serenity_protocol::checksum::xxh3_64(page) } else { 0 });
    let this = SlabFile {
        path: temp.path().to_path_buf(),
        file,
        file_bytes: bytes.len() as u64,
        page_bytes,
        pages: bytes.chunks(page_bytes as usize).map(hash).collect(),
        from_manifest: hashes,
        read_bytes: AtomicU64::new(0),
        direct: true,
        kept: Mutex::default(),
    };
    (temp, Arc::new(this))
}

fn content(len: usize) -> Vec<u8> {
    (0..len).map(|i| (i as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15).to_le_bytes()[7]).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]
    #[test]
    fn any_ranges_come_back_equal_from_both_engines(
        len in 1usize..300_000, page_shift in 0u32..5, raw in proptest::collection::vec((0u32..1000, 0u32..1000), 1..6), hashes: bool,
    ) {
        let bytes = content(len);
        let (_temp, slab) = slab_file(&bytes, 4096 << page_shift, hashes);
        let ranges: Vec<Range<u64>> = raw.iter().map(|&(a, b)| {
            let (a, b) = (a.min(b) as u64 * len as u64 / 1000, a.max(b) as u64 * len as u64 / 1000);
            a..b
        }).collect();
        for mut reader in [Reader::new(slab.clone()), Reader::with_threads(slab.clone())] {
            let mut into = Fetched::new();
            reader.fetch(&ranges, &mut into).unwrap();
            for range in ranges.iter().filter(|r| r.start < r.end) {
                prop_assert_eq!(into.bytes(range).unwrap(), &bytes[range.start as usize..range.end as usize]);
            }
        }
    }
}

#[test]
fn a_flipped_byte_is_named_by_its_page() {
    let bytes = content(40_000);
    let (temp, slab) = slab_file(&bytes, 8192, true);
    let mut broken = bytes.clone();
    broken[20_000] ^= 1;
    std::fs::write(temp.path(), &broken).unwrap();
    let mut reader = Reader::new(slab.clone());
    reader.fetch(std::slice::from_ref(&(0..16_000)), &mut Fetched::new()).unwrap();
    let error = reader.fetch(std::slice::from_ref(&(19_000..19_001)), &mut Fetched::new()).unwrap_err();
    assert_eq!(error.exit_code(), 65);
    assert!(error.to_string().contains("offset 16384"), "{error}");
}

#[test]
fn without_hashes_a_change_between_two_reads_is_noticed() {
    let bytes = content(40_000);
    let (temp, slab) = slab_file(&bytes, 8192, false);
    let mut reader = Reader::new(slab);
    reader.fetch(std::slice::from_ref(&(0..40_000)), &mut Fetched::new()).unwrap();
    let mut broken = bytes.clone();
    broken[39_999] ^= 0x80;
    std::fs::write(temp.path(), &broken).unwrap();
    assert_eq!(reader.fetch(std::slice::from_ref(&(0..40_000)), &mut Fetched::new()).unwrap_err().exit_code(), 65);
}

#[test]
fn a_file_that_became_shorter_is_data_not_a_crash() {
    for threads in [false, true] {
        let (temp, slab) = slab_file(&content(100_000), 4096, true);
        File::options().write(true).open(temp.path()).unwrap().set_len(50_000).unwrap();
        let mut reader = if threads { Reader::with_threads(slab) } else { Reader::new(slab) };
        let error = reader.fetch(std::slice::from_ref(&(0..100_000)), &mut Fetched::new()).unwrap_err();
        assert_eq!(error.exit_code(), 65, "{error}");
    }
}

#[test]
fn needed_and_outside_pages_cover_the_file_once() {
    let (_temp, slab) = slab_file(&content(100_000), 4096, true);
    let needed = [5_000..9_000, 40_000..40_001, 90_000..100_000];
    let mut seen = vec![0u8; 100_000usize.div_ceil(4096)];
    let pages = |r: &Range<u64>| (r.start / 4096) as usize..r.end.div_ceil(4096) as usize;
    for range in needed.iter().chain(&slab.pages_outside(&needed)) {
        seen[pages(range)].iter_mut().for_each(|n| *n += 1);
    }
    assert!(seen.iter().all(|n| *n == 1), "{seen:?}");
    assert_eq!(slab.pages_outside(&[]).iter().map(|r| r.end - r.start).sum::<u64>(), 100_000);
}
