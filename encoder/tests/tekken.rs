//! The tokenizer with the real Tekken vocabulary against the reference's ids (`scripts/tekken_tokenizer.py` made both).
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::io::Write;
use std::path::PathBuf;

use serde_json::Value;
use serenity_encoder::tokenizer::Tokenizer;

const FIXTURE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/tekken.json");

fn ids(value: &Value) -> Vec<u32> {
    value.as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect()
}

#[test]
fn ids_of_two_hundred_prompts_are_the_references() {
    let fixture: Value = serde_json::from_str(&std::fs::read_to_string(FIXTURE).unwrap()).unwrap();
    let prompts = fixture["prompts"].as_array().unwrap();
    assert_eq!(prompts.len(), 200);
    let Some(folder) = std::env::var_os("SERENITY_TEKKEN").map(PathBuf::from) else {
        // Past the test harness's capture: a test that did not run must be seen.
        let _ = writeln!(std::io::stderr(), "SKIPPED: SERENITY_TEKKEN names no tokenizer folder; scripts/tekken_tokenizer.py makes one");
        return;
    };
    let tokenizer = Tokenizer::open(&folder).unwrap();
    assert_eq!(tokenizer.pad_id(), 11);
    let (head, tail) = (ids(&fixture["head"]), ids(&fixture["tail"]));
    let mut longer_than_512 = 0;
    for row in prompts {
        let prompt = row["prompt"].as_str().unwrap();
        let whole: Vec<u32> = head.iter().copied().chain(ids(&row["ids"])).chain(tail.iter().copied()).collect();
        let ours = tokenizer.encode(prompt, usize::MAX).unwrap();
        assert_eq!((ours.ids, ours.cut), (whole.clone(), 0), "{prompt:?}");
        let cut = tokenizer.encode(prompt, 512).unwrap();
        assert_eq!(cut.ids, whole[..whole.len().min(512)], "{prompt:?} cut on the right");
        assert_eq!(cut.cut, whole.len().saturating_sub(512));
        longer_than_512 += usize::from(cut.cut > 0);
    }
    assert!(longer_than_512 >= 2, "prompts that are cut");
    let plain = tokenizer.encode("an image", 512).unwrap();
    assert_eq!(tokenizer.encode("[IMG]an [IMG]image[IMG]", 512).unwrap(), plain);
}
