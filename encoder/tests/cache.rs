//! The job: what is encoded, what is reused, what is refused.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use serenity_encoder::engine::HiddenBudget;
use serenity_encoder::run::{RunOptions, Shard, Summary, run};
use serenity_protocol::cache::TextEntry;
use serenity_protocol::message::Role;
use serenity_protocol::process::Process;

mod lab;
use lab::{Dir, counts};

#[test]
fn one_more_image_costs_one_and_the_same_again_costs_nothing() {
    let dir = Dir::new(&["a cat", "a cat", "東京 🚀"]);
    assert_eq!(counts(dir.run("cache").unwrap()), (2, 3, 0), "equal captions share an entry");
    assert_eq!(counts(dir.run("cache").unwrap()), (0, 0, 5));
    dir.add(3, "a dog");
    assert_eq!(counts(dir.run("cache").unwrap()), (1, 1, 5));
    // Once the files have been left alone for a while, nothing is opened but entries' time stamps.
    std::thread::sleep(std::time::Duration::from_millis(2100));
    assert!(dir.run("cache").unwrap().files_hashed > 0);
    assert_eq!(dir.run("cache").unwrap().files_hashed, 0);
}

#[test]
fn alone_in_shards_or_together_gives_the_same_bytes() {
    let captions = ["a photo of an astronaut in an orange suit", "", "a tabby cat, a tabby cat"];
    let dir = Dir::new(&captions);
    dir.run("together").unwrap();
    let process = Process::detached(Role::Encoder);
    let options = RunOptions { budget: HiddenBudget { memory_bytes_max: 1, file_bytes_max: Some(1) }, ..RunOptions::default() };
    run(&dir.config("alone", &[]), options, &process).unwrap();
    for index in 0..2 {
        let options = RunOptions { shard: Shard { index, of: 2 }, ..RunOptions::default() };
        run(&dir.config("shards", &[]), options, &process).unwrap();
    }
    let together = dir.entries("together");
    assert_eq!(together.len(), 6);
    assert!(together == dir.entries("alone"));
    assert!(together == dir.entries("shards"));
}

#[test]
fn corrupt_and_cut_entries_are_made_again() {
    let dir = Dir::new(&["one", "two"]);
    dir.run("cache").unwrap();
    let before = dir.entries("cache");
    let mut files = before.keys().map(|name| dir.path("cache").join(name));
    let (flipped, cut) = (files.next().unwrap(), files.next_back().unwrap());
    let mut bytes = std::fs::read(&flipped).unwrap();
    let last = bytes.len() - 1;
    bytes[last] ^= 1;
    std::fs::write(&flipped, &bytes).unwrap();
    std::fs::write(&cut, &std::fs::read(&cut).unwrap()[..100]).unwrap();
    assert_eq!(counts(dir.run("cache").unwrap()), (1, 1, 2));
    assert!(dir.entries("cache") == before);
}

#[test]
fn a_reader_sets_a_corrupt_entry_aside_for_the_next_run() {
    let dir = Dir::new(&["one"]);
    dir.run("cache").unwrap();
    let plan = dir.plan(&dir.config("cache", &[]));
    assert!(plan.is_complete());
    let whole = std::fs::read(&plan.text[0].path).unwrap();
    std::fs::write(&plan.text[0].path, &whole[1..]).unwrap();
    assert_eq!(plan.read_text(0).unwrap_err().exit_code(), 65);
    assert!(!plan.text[0].path.exists());
    assert_eq!(counts(dir.run("cache").unwrap()), (1, 0, 1));
    assert!(plan.read_text(0).is_ok() && plan.read_latent(0).is_ok());
}

#[test]
fn a_changed_encoder_or_tokenizer_never_meets_old_entries() {
    let dir = Dir::new(&["one", "two"]);
    dir.run("cache").unwrap();
    let before = dir.plan(&dir.config("cache", &[]));
    let flip = |name: &str| {
        let mut bytes = std::fs::read(dir.path(name)).unwrap();
        let at = bytes.len() - 5;
        bytes[at] ^= 1;
        std::fs::write(dir.path(name), bytes).unwrap();
    };
    flip("model/text_encoder/model-00002-of-00003.safetensors");
    let text_changed = dir.plan(&dir.config("cache", &[]));
    assert!(text_changed.text.iter().all(|t| !t.present && before.text.iter().all(|b| b.key != t.key)));
    assert!(text_changed.latents == before.latents);
    flip("model/vae/diffusion_pytorch_model.safetensors");
    let vae_changed = dir.plan(&dir.config("cache", &[]));
    assert!(vae_changed.latents.iter().all(|l| !l.present));
    let other = |set: &str| dir.plan(&dir.config("cache", &[set]));
    assert!(other("model.max_sequence_length=95").text.iter().all(|t| !t.present));
    assert!(other("model.text_hidden_states=[1,2,3]").text.iter().all(|t| !t.present));
    assert!(other("resolution=80").latents.iter().all(|l| vae_changed.latents.iter().all(|v| v.key != l.key)));
    let tokenizer = dir.path("model/tokenizer/tokenizer_config.json");
    std::fs::write(&tokenizer, std::fs::read_to_string(&tokenizer).unwrap() + "\n").unwrap();
    assert!(other("resolution=64").text.iter().all(|t| text_changed.text.iter().all(|b| b.key != t.key)));
}

#[test]
fn long_captions_are_cut_on_the_right_and_short_ones_padded_on_the_left() {
    let dir = Dir::new(&["a tabby cat a tabby cat a tabby cat", "short"]);
    let config = dir.config("cache", &["model.max_sequence_length=40"]);
    run(&config, RunOptions::default(), &Process::detached(Role::Encoder)).unwrap();
    let plan = dir.plan(&config);
    let entries: Vec<TextEntry> = (0..2).map(|i| plan.read_text(plan.samples[i].text).unwrap()).collect();
    assert_eq!((entries[0].real_tokens, entries[0].max_length), (40, 40));
    assert!(entries[1].real_tokens < 40);
    let expanded = entries[1].expand();
    assert_eq!(expanded.len(), 40 * entries[1].features);
    assert_eq!(expanded[..entries[1].features], entries[1].pad_row[..]);
    assert_eq!(expanded[(40 - entries[1].real_tokens) * entries[1].features..], entries[1].rows[..]);
}

#[test]
fn wrong_tokenizers_and_weights_are_refused() {
    let code = |dir: &Dir| dir.run("cache").map(|_| ()).map_err(|e| (e.exit_code(), e.to_string()));
    let dir = Dir::new(&["one"]);
    let file = dir.path("model/tokenizer/tokenizer_config.json");
    let text = std::fs::read_to_string(&file).unwrap();
    std::fs::write(&file, text.replace("\"padding_side\": \"left\"", "\"padding_side\": \"right\"")).unwrap();
    let (exit, message) = code(&dir).unwrap_err();
    assert!(exit == 65 && message.contains("tokenizer_config.json") && message.contains("right"), "{message}");
    std::fs::write(&file, text).unwrap();

    let config = dir.path("model/text_encoder/config.json");
    let text = std::fs::read_to_string(&config).unwrap();
    std::fs::write(&config, text.replace("\"intermediate_size\": 96", "\"intermediate_size\": 128")).unwrap();
    let (exit, message) = code(&dir).unwrap_err();
    assert!(exit == 65 && message.contains("mlp.gate_proj"), "{message}");
    std::fs::write(&config, text).unwrap();

    std::fs::remove_file(dir.path("model/text_encoder/model-00003-of-00003.safetensors")).unwrap();
    assert_eq!(code(&dir).unwrap_err().0, 69);
}

#[test]
fn an_unreadable_image_is_named_after_the_good_ones_are_done() {
    let dir = Dir::new(&["one", "two", "three"]);
    std::fs::write(dir.path("images/1.png"), b"no image").unwrap();
    let error = dir.run("cache").unwrap_err();
    assert_eq!(error.exit_code(), 65);
    assert!(error.to_string().contains("images/1.png"), "{error}");
    assert_eq!(dir.plan(&dir.config("cache", &[])).missing_latents().count(), 1);
    dir.add(1, "two");
    assert_eq!(counts(dir.run("cache").unwrap()), (3, 1, 2));
}

#[test]
fn a_stopped_run_keeps_what_is_done_and_the_next_goes_on() {
    let dir = Dir::new(&["one", "two"]);
    dir.run("whole").unwrap();
    let process = Process::detached(Role::Encoder);
    // Relaxed: a lone flag, see Process::stop_requested.
    process.stop_flag().store(true, std::sync::atomic::Ordering::Relaxed);
    let config = dir.config("cache", &[]);
    assert_eq!(run(&config, RunOptions::default(), &process).unwrap_err().exit_code(), 75);
    assert_eq!(dir.entries("cache").len(), 1, "the image that was being encoded");
    assert_eq!(counts(dir.run("cache").unwrap()), (2, 1, 1));
    assert!(dir.entries("cache") == dir.entries("whole"));
}

#[test]
fn two_encoders_share_a_folder_without_doing_work_twice() {
    let captions: Vec<String> = (0..12).map(|i| format!("caption {i}")).collect();
    let dir = Dir::new(&captions.iter().map(String::as_str).collect::<Vec<_>>());
    dir.run("alone").unwrap();
    let summaries: Vec<Summary> = std::thread::scope(|scope| {
        let both: Vec<_> = (0..2).map(|_| scope.spawn(|| dir.run("shared").unwrap())).collect();
        both.into_iter().map(|t| t.join().unwrap()).collect()
    });
    let made = |f: fn(&Summary) -> usize| summaries.iter().map(f).sum::<usize>();
    assert_eq!((made(|s| s.captions), made(|s| s.images)), (12, 12), "{summaries:?}");
    assert!(dir.entries("shared") == dir.entries("alone"));
    assert!(!dir.path("shared/claims").exists());
}

#[test]
fn a_thousand_cached_images_take_less_than_a_second() {
    const IMAGES: usize = 1000;
    let dir = Dir::new(&[]);
    for i in 0..IMAGES {
        let pixel = image::Rgb([i as u8, (i / 256) as u8, 7]);
        image::RgbImage::from_pixel(16, 16, pixel).save(dir.path(&format!("images/{i}.png"))).unwrap();
        std::fs::write(dir.path(&format!("images/{i}.txt")), format!("number {i}")).unwrap();
    }
    let config = dir.config("cache", &[]);
    // What the entries hold does not matter here.
    let plan = dir.plan(&config);
    for item in &plan.latents {
        serenity_protocol::cache::LatentEntry { channels: 16, height: 4, width: 4, tokens: vec![0.5; 256] }.write(&item.path, &[]).unwrap();
    }
    for item in &plan.text {
        let (rows, pad_row) = (vec![half::bf16::ONE; 40 * 240], vec![half::bf16::ZERO; 240]);
        TextEntry { real_tokens: 40, max_length: 96, features: 240, rows, pad_row }.write(&item.path, &[]).unwrap();
    }
    std::thread::sleep(std::time::Duration::from_millis(2100));
    // The first run after a while verifies and remembers; every later one opens nothing.
    assert_eq!(counts(dir.run("cache").unwrap()), (0, 0, 2 * IMAGES));
    let started = std::time::Instant::now();
    let summary = dir.run("cache").unwrap();
    println!("{IMAGES} cached images in {:.3} s", started.elapsed().as_secs_f64());
    assert_eq!((counts(summary), summary.files_hashed), ((0, 0, 2 * IMAGES), 0));
}

#[test]
fn the_folder_is_listed_verified_and_pruned() {
    use serenity_encoder::cache_tool::{Pruned, list, prune, verify};
    let dir = Dir::new(&["one", "two"]);
    dir.run("cache").unwrap();
    let (config, process) = (dir.config("cache", &[]), Process::detached(Role::Encoder));
    let listed = list(&config).unwrap();
    assert_eq!((listed.len(), listed.iter().filter(|l| l.used && l.kind == "text").count()), (4, 2));
    assert!(listed.iter().any(|l| l.what.contains("\"two\"")) && listed.iter().any(|l| l.what == "4 x 4 tokens"));
    assert_eq!(verify(&config, &process).unwrap(), 4);
    assert_eq!(prune(&config, false).unwrap(), Pruned::default());
    // One corrupt entry, one caption that changed, one file of a writer that died long ago.
    let victim = &listed.iter().find(|l| l.kind == "latent").unwrap().path;
    std::fs::write(victim, b"short").unwrap();
    std::fs::write(dir.path("images/1.txt"), "another").unwrap();
    let partial = victim.with_extension("safetensors.1234-1.partial");
    std::fs::write(&partial, b"x").unwrap();
    let past = std::time::SystemTime::now() - std::time::Duration::from_secs(7200);
    std::fs::File::options().write(true).open(&partial).unwrap().set_modified(past).unwrap();
    let error = verify(&config, &process).unwrap_err();
    assert_eq!(error.exit_code(), 65);
    assert!(error.to_string().contains("1 of 4"), "{error}");
    let expected = prune(&config, true).unwrap();
    assert_eq!((expected.entries, expected.leftovers), (1, 2));
    assert_eq!(prune(&config, false).unwrap(), expected);
    assert_eq!(list(&config).unwrap().len(), 2);
    assert_eq!(counts(dir.run("cache").unwrap()), (1, 1, 2));
    // What cannot be read is not corrupt: a folder in an entry's place, which root cannot read either.
    let unreadable = &list(&config).unwrap().into_iter().find(|l| l.kind == "latent").unwrap().path;
    std::fs::remove_file(unreadable).unwrap();
    std::fs::create_dir(unreadable).unwrap();
    let error = verify(&config, &process).unwrap_err();
    assert!(error.exit_code() != 65 && error.to_string().contains("1 of 4 entries cannot be read"), "{error}");
    assert!(unreadable.is_dir());
}

#[test]
fn fifty_kills_at_random_points_leave_no_corrupt_entry_and_the_same_cache() {
    const KILLS: usize = 50;
    let captions: Vec<String> = (0..10).map(|i| format!("a caption that is number {i}")).collect();
    let dir = Dir::new(&captions.iter().map(String::as_str).collect::<Vec<_>>());
    dir.run("whole").unwrap();
    let whole = dir.entries("whole");
    let config = serde_json::json!({
        "model": {"path": dir.path("model"), "max_sequence_length": 96},
        "data": {"concepts": [{"path": dir.path("images")}], "cache_dir": dir.path("cache")},
        "resolution": 64, "output_dir": dir.path("out"), "train_device": "cpu",
    });
    std::fs::write(dir.path("config.json"), config.to_string()).unwrap();
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut killed_at_work = 0;
    for _ in 0..KILLS {
        let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_serenity-encoder"));
        let mut child = command.arg("--config").arg(dir.path("config.json")).stderr(std::process::Stdio::null()).spawn().unwrap();
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        std::thread::sleep(std::time::Duration::from_millis((state >> 33) % 400));
        killed_at_work += usize::from(child.try_wait().unwrap().is_none());
        child.kill().unwrap();
        child.wait().unwrap();
        // Whatever carries an entry's name is that entry.
        std::fs::create_dir_all(dir.path("cache")).unwrap();
        let entries = dir.entries("cache");
        assert!(entries.iter().all(|(name, bytes)| whole.get(name) == Some(bytes)));
        if entries.len() == whole.len() {
            std::fs::remove_dir_all(dir.path("cache")).unwrap();
        }
    }
    assert!(killed_at_work >= KILLS / 4, "only {killed_at_work} of {KILLS} were killed before their end");
    // The dead one's claims hold nobody up.
    let started = std::time::Instant::now();
    dir.run("cache").unwrap();
    // A claim of another machine's dead process would hold it up for a minute.
    assert!(started.elapsed() < std::time::Duration::from_secs(55));
    assert!(dir.entries("cache") == whole);
}
