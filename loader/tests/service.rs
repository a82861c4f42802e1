#![allow(clippy::unwrap_used, clippy::expect_used)]
//! The loader service over the original builder's slab, against a consumer that compares every byte with an independent reading of
//! the file: safetensors crate, plain arithmetic.

use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::time::Duration;

use half::bf16;
use safetensors::SafeTensors;
use serenity_loader::service;
use serenity_protocol::config::PayloadForm;
use serenity_protocol::geometry::{BlockId, TransformerGeometry};
use serenity_protocol::message::Role;
use serenity_protocol::process::Process;
use serenity_protocol::ring::consumer::Consumer;
use serenity_protocol::ring::plan::RingPlan;
use serenity_protocol::ring::segment::{RingSpec, Segment};
use serenity_protocol::ring::words::{consumer, loader};
use serenity_protocol::slab::Slab;
use serenity_protocol::slab::layout::PartKind;

fn goldens() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/goldens")
}

fn open() -> (Slab, TransformerGeometry) {
    let folder = goldens().join("cases/squareq");
    let slab = Slab::open(&folder.join("flux2tiny_int8.safetensors"), &folder.join("flux2tiny_int8.manifest.json")).unwrap();
    (slab, TransformerGeometry::from_config_file(&goldens().join("model/transformer/config.json")).unwrap())
}

/// The payload of every block, computed without any of our readers.
fn expected_payloads(slab: &Slab, plan: &RingPlan) -> Vec<Vec<u8>> {
    let bytes = std::fs::read(slab.path()).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let block = |layout: &serenity_protocol::slab::layout::BlockLayout| {
        let mut payload = vec![0u8; layout.bytes as usize];
        for part in &layout.parts {
            let q = tensors.tensor(&format!("{}.qweight", part.linear)).unwrap();
            let scale = tensors.tensor(&format!("{}.scale", part.linear)).unwrap();
            let out = &mut payload[part.offset as usize..(part.offset + part.bytes) as usize];
            match part.kind {
                PartKind::Int8Rows => out.copy_from_slice(q.data()),
                PartKind::Scales => out.copy_from_slice(scale.data()),
                PartKind::Bf16Rows => {
                    for row in 0..part.out_features {
                        let s = f32::from_le_bytes(scale.data()[4 * row..4 * row + 4].try_into().unwrap());
                        for column in 0..part.in_features {
                            let code = q.data()[row * q.shape()[1] + column] as i8;
                            let at = 2 * (row * part.in_features + column);
                            out[at..at + 2].copy_from_slice(&bf16::from_f32(f32::from(code) * s).to_le_bytes());
                        }
                    }
                }
            }
        }
        payload
    };
    plan.layout.blocks.iter().map(block).collect()
}

fn plan(name: &str, slab: &Slab, geometry: &TransformerGeometry, form: PayloadForm, slots: usize, chunk_bytes: u64) -> RingPlan {
    RingPlan::with(format!("serenity-test-{}-{name}", std::process::id()), slab, geometry, form, slots, chunk_bytes).unwrap()
}

/// Serves `order` and compares; returns the bytes read from the slab.
fn serve_and_compare(plan: &RingPlan, slab: &Slab, geometry: &TransformerGeometry, order: &[u16]) -> u64 {
    let expected = expected_payloads(slab, plan);
    let segment = Segment::open_or_create(&plan.spec).unwrap();
    let process = Process::detached(Role::Loader);
    std::thread::scope(|scope| {
        let service = scope.spawn(|| service::serve_segment(plan, slab, geometry, &segment, &process));
        let ours = Segment::open(&plan.spec).unwrap().expect("made above");
        let mut ring = Consumer::attach(ours.clone(), ours.shape(), plan.catalogue().unwrap()).unwrap();
        assert_eq!(ring.post(order).unwrap(), order.len());
        ours.wake(loader::WAKE);
        for &block in order {
            for chunk in 0..plan.layout.chunks_of(BlockId(block)) {
                let leased = loop {
                    let ticket = ours.ticket(consumer::WAKE);
                    match ring.try_lease().unwrap() {
                        Some(leased) => break leased,
                        None => {
                            assert!(!service.is_finished(), "the service ended early");
                            ours.wait(consumer::WAKE, ticket);
                        }
                    }
                };
                let range = plan.layout.blocks[usize::from(block)].chunk_range(chunk, plan.layout.chunk_bytes);
                // SAFETY: the slot is leased to us until the release below.
                let bytes = unsafe { ours.slot_payload(leased.slot, leased.bytes) };
                assert_eq!(bytes, &expected[usize::from(block)][range.start as usize..range.end as usize], "block {block} chunk {chunk}");
                ring.release(&leased).unwrap();
                ours.wake(loader::WAKE);
            }
        }
        process.stop_flag().store(true, Ordering::Relaxed);
        ours.wake(loader::WAKE);
        service.join().unwrap().unwrap();
        ours.leave();
    });
    let read = segment.words()[loader::READ_BYTES].load(Ordering::Acquire);
    segment.leave();
    assert!(!plan.spec.path().exists(), "nothing stays in shared memory");
    read
}

#[test]
fn every_byte_arrives_in_every_form_chunk_size_and_pool() {
    let (slab, geometry) = open();
    let order: Vec<u16> = (0..5).chain((0..4).rev()).chain([0, 0, 3, 3, 1]).collect();
    for form in [PayloadForm::Bf16, PayloadForm::Int8] {
        for (slots, chunk_bytes) in [(1, 4096), (2, 4096), (7, 8192), (3, 1 << 20), (64, 65536)] {
            let plan = plan(&format!("{form:?}-{slots}"), &slab, &geometry, form, slots, chunk_bytes);
            serve_and_compare(&plan, &slab, &geometry, &order);
        }
    }
}

#[test]
fn a_new_loader_goes_on_where_a_dead_one_stopped() {
    let (slab, geometry) = open();
    let plan = plan("again", &slab, &geometry, PayloadForm::Bf16, 3, 8192);
    let spec: &RingSpec = &plan.spec;
    let expected = expected_payloads(&slab, &plan);
    let order: Vec<u16> = (0..5).chain((0..4).rev()).collect();
    let mut segment = Segment::open_or_create(spec).unwrap();
    let ours = Segment::open(spec).unwrap().expect("made above");
    let mut ring = Consumer::attach(ours.clone(), ours.shape(), plan.catalogue().unwrap()).unwrap();
    ring.post(&order).unwrap();
    let mut due = order.iter().flat_map(|b| (0..plan.layout.chunks_of(BlockId(*b))).map(move |c| (*b, c))).peekable();
    let mut lives = 0;
    while due.peek().is_some() {
        lives += 1;
        let process = Process::detached(Role::Loader);
        std::thread::scope(|scope| {
            let service = scope.spawn(|| service::serve_segment(&plan, &slab, &geometry, &segment, &process));
            // A few chunks, then this loader goes, with slots READY and in the middle of being filled.
            for _ in 0..5 {
                let Some((block, chunk)) = due.next() else { break };
                let leased = loop {
                    match ring.try_lease().unwrap() {
                        Some(leased) => break leased,
                        None => ours.wait(consumer::WAKE, ours.ticket(consumer::WAKE)),
                    }
                };
                let range = plan.layout.blocks[usize::from(block)].chunk_range(chunk, plan.layout.chunk_bytes);
                // SAFETY: leased until the release below.
                let bytes = unsafe { ours.slot_payload(leased.slot, leased.bytes) };
                assert_eq!(bytes, &expected[usize::from(block)][range.start as usize..range.end as usize]);
                ring.release(&leased).unwrap();
                ours.wake(loader::WAKE);
            }
            process.stop_flag().store(true, Ordering::Relaxed);
            service.join().unwrap().unwrap();
        });
        drop(segment);
        segment = Segment::open_or_create(spec).unwrap();
    }
    assert!(lives > 3, "{lives} loaders served {} visits", order.len());
    ours.leave();
    segment.leave();
    assert!(!spec.path().exists());
}

#[test]
fn a_pool_as_large_as_the_slab_reads_it_once() {
    let (slab, geometry) = open();
    let plan = plan("once", &slab, &geometry, PayloadForm::Int8, 8, 1 << 20);
    let once = serve_and_compare(&plan, &slab, &geometry, &(0..5).collect::<Vec<_>>());
    let often = serve_and_compare(&plan, &slab, &geometry, &(0..5).chain((0..4).rev()).chain(0..5).collect::<Vec<_>>());
    assert_eq!(once, often);
}

#[test]
fn a_corrupt_page_ends_the_service_with_exit_65() {
    let (slab, geometry) = open();
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let copy = folder.path().join("slab.safetensors");
    let mut bytes = std::fs::read(slab.path()).unwrap();
    std::fs::write(&copy, &bytes).unwrap();
    let slab = Slab::open(&copy, slab.manifest_path()).unwrap();
    let plan = plan("flip", &slab, &geometry, PayloadForm::Int8, 1, 4096);
    let segment = Segment::open_or_create(&plan.spec).unwrap();
    let ours = Segment::open(&plan.spec).unwrap().expect("made above");
    let mut ring = Consumer::attach(ours.clone(), ours.shape(), plan.catalogue().unwrap()).unwrap();
    ring.post(&[0, 0]).unwrap();
    let process = Process::detached(Role::Loader);
    std::thread::scope(|scope| {
        let service = scope.spawn(|| service::serve_segment(&plan, &slab, &geometry, &segment, &process));
        let mut chunks = 0;
        while !service.is_finished() {
            if let Some(leased) = ring.try_lease().unwrap() {
                chunks += 1;
                if chunks == 3 {
                    // This slab has no hashes of its own: what counts is what was read first.
                    let at = bytes.len() - 9;
                    bytes[at] ^= 4;
                    std::fs::write(&copy, &bytes).unwrap();
                }
                ring.release(&leased).unwrap();
                ours.wake(loader::WAKE);
            }
            std::thread::sleep(Duration::from_micros(200));
        }
        let error = service.join().unwrap().unwrap_err();
        assert_eq!(error.exit_code(), 65, "{error}");
    });
    ours.leave();
    segment.leave();
}
