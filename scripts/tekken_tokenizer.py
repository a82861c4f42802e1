#!/usr/bin/env python3
"""Makes a tokenizer folder out of the public Tekken vocabulary, and the fixture that our tokenizer is tested with.

The vocabulary (tekken_240911.json, in the mistral-common wheel) is too large for the repository. With it,
    pip download --no-deps mistral-common && unzip mistral_common*.whl 'mistral_common/data/tekken_240911.json'
    scripts/tekken_tokenizer.py mistral_common/data/tekken_240911.json --tokenizer FOLDER
    SERENITY_TEKKEN=FOLDER cargo test --release -p serenity-encoder --test tekken -- --nocapture
compares the ids of 200 prompts with those of mistral-common, which encoder/tests/fixtures/tekken.json holds. `--fixture FILE` makes that
file anew (needs mistral-common installed). FLUX.2's own tokenizer.json splits a few words otherwise: runs use the shipped file as it is.
"""
import argparse
import base64
import hashlib
import json
import random
import unicodedata
from pathlib import Path

SYSTEM = ("You are an AI that reasons about image descriptions. You give structured responses focusing on object relationships, object\n"
          "attribution and actions without speculation.")


def byte_letters():
    """The printable letter of each byte in byte-level BPE files."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    letters, extra = {b: chr(b) for b in plain}, 0
    for b in range(256):
        if b not in letters:
            letters[b] = chr(256 + extra)
            extra += 1
    return letters


def tokenizer_json(tekken):
    config = tekken["config"]
    special_count = config["default_num_special_tokens"]
    ranked = tekken["vocab"][: config["default_vocab_size"] - special_count]
    ranks = {base64.b64decode(t["token_bytes"]): t["rank"] for t in ranked}
    letters = byte_letters()
    write = lambda token: "".join(letters[b] for b in token)
    # This version of the file does not list its special tokens; these are those that the template and the padding use.
    named = {0: "<unk>", 1: "<s>", 2: "</s>", 3: "[INST]", 4: "[/INST]", 10: "[IMG]", 11: "<pad>", 17: "[SYSTEM_PROMPT]", 18: "[/SYSTEM_PROMPT]"}
    named.update({s["rank"]: s["token_str"] for s in tekken.get("special_tokens", [])})
    specials = [named.get(i, f"<SPECIAL_{i}>") for i in range(special_count)]
    vocab = {s: i for i, s in enumerate(specials)}
    merges = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        vocab[write(token)] = rank + special_count
        # Every split into two tokens; the lower the ranks of the two, the earlier it would have been made.
        splits = [(ranks[token[:i]], ranks[token[i:]], token[:i], token[i:]) for i in range(1, len(token)) if token[:i] in ranks and token[i:] in ranks]
        merges += [f"{write(a)} {write(b)}" for _, _, a, b in sorted(splits)]
    added = [{"id": i, "content": s, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
             for i, s in enumerate(specials)]
    split = {"type": "Split", "pattern": {"Regex": config["pattern"]}, "behavior": "Isolated", "invert": False}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, level]}, "post_processor": None, "decoder": level,
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None,
                  "fuse_unk": False, "byte_fallback": False, "ignore_merges": True, "vocab": vocab, "merges": merges},
    }


def prompts():
    fixed = [
        "", " ", "a", "a photo of an astronaut riding a horse", "A TABBY CAT, sitting", "don't, can't, I'll, we've, y'all'd've", "  two  spaces  ",
        "tab\there", "line\nbreak", "windows\r\nbreak", "trailing newline\n", "\n\n\n", "\u00a0no-break\u00a0", "[not a token]", "<not a token>",
        "1234567890", "3.14159265358979", "1,000,000.00 €", "2024-11-25T12:34:56Z", "0x7fff_ffff", "½ ⅓ ²",
        "東京タワーの夜景、ネオンの光", "一只橘猫坐在窗台上，看着外面的雨。", "繁體中文：龍飛鳳舞", "서울의 야경과 한강", "กรุงเทพมหานคร เมืองหลวง", "مدينة قديمة عند الغروب",
        "שלום עולם בירושלים", "हिमालय की चोटियाँ", "தமிழ் எழுத்துக்கள்", "বাংলা ভাষা", "Ελληνικά γράμματα", "Кошка сидит на окне", "Українська їжа", "Հայերեն լեզու",
        "ქართული ენა", "አማርኛ ፊደል", "ไทย", "Tiếng Việt có dấu", "Ærøskøbing, Þingvellir, Łódź", "naïve café", "nai\u0308ve cafe\u0301", "ﬁne ligature", "Straße GROẞ",
        "🚀", "👩‍👩‍👧‍👦 family", "🏳️‍🌈🇯🇵🇺🇦", "emoji 😀😃😄 in a row", "❤️ vs ❤", "(╯°□°)╯︵ ┻━┻", "C++ && Rust::<T>() -> Vec<u8>", "fn main() { println!(\"hi\"); }",
        "https://example.com/a/b?c=d&e=%20f#g", "user@example.com", "/usr/local/bin/x.tar.gz", "snake_case camelCase PascalCase SCREAMING_CASE", "a-b-c—d–e…", "“quotes” ‘and’ «these»",
        "$100 #1 50% a*b ~c ^d `e` |f|", "!!!???...", "\\n is not a newline", "\u200bzero\u200cwidth\u200djoiner", "\ufeffbom inside", "\u202eright to left", "x" * 300, "ab " * 400,
        "word " * 900, "长" * 700, "9" * 600, "\u0000nul", "\u0007bell", "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𝕞𝕒𝕥𝕙", "Z̷̢̛a̸l̵g̴o̶", "ⅣⅤⅥ roman", "①②③", "٣٤٥ ۱۲۳ १२३", "日本語とEnglishとРусскийのmix", "iPhone15Pro", "USB3.2Gen2x2",
        "a, (b), [c], {d}; e: f", "ALLCAPSfollowedByLower", "don’t curly", "rock 'n' roll", "O'Brien's", "l'été d'aujourd'hui", "  leading", "trailing  ", "a\u3000ideographic\u3000space",
    ]
    rng = random.Random(20241125)
    pieces = ["cat", " dog", "Über", " the", "\n", "  ", "42", "東京", " 서울", "привет", "🚀", "'s", "—", "!", ".", ",", " صباح", "é", "e\u0301", "ไท", "[INST", "/", "\t", "ÀÉÎ", " IJ", "x1", "ʰ", "Dž"]
    ranges = [(0x20, 0x7E), (0xA0, 0x24F), (0x370, 0x52F), (0x590, 0x6FF), (0x900, 0xD7F), (0x3040, 0x30FF), (0x4E00, 0x9FFF), (0xAC00, 0xD7A3), (0x1F300, 0x1FAFF)]
    while len(fixed) < 160:
        fixed.append("".join(rng.choice(pieces) for _ in range(rng.randint(2, 30))))
    while len(fixed) < 200:
        letters = [chr(rng.randint(*rng.choice(ranges))) for _ in range(rng.randint(3, 60))]
        fixed.append("".join(c for c in letters if unicodedata.category(c) != "Cn"))
    assert len(set(fixed)) == 200
    return fixed


def fixture(path):
    from mistral_common.tokens.tokenizers.tekken import Tekkenizer
    reference = Tekkenizer.from_file(str(path))
    text = lambda part: reference.encode(part, bos=False, eos=False)
    control = reference.get_special_token
    rows = []
    for prompt in prompts():
        head = [control("<s>"), control("[SYSTEM_PROMPT]"), *text(SYSTEM), control("[/SYSTEM_PROMPT]"), control("[INST]")]
        rows.append({"prompt": prompt, "ids": text(prompt), "whole": len(head) + len(text(prompt)) + 1})
    return {"vocabulary_sha256": hashlib.sha256(path.read_bytes()).hexdigest(), "head": head, "tail": [control("[/INST]")], "prompts": rows}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tekken", type=Path)
    parser.add_argument("--tokenizer", type=Path, help="folder to write tokenizer.json and tokenizer_config.json to")
    parser.add_argument("--fixture", type=Path, help="file to write the reference's ids to")
    args = parser.parse_args()
    if args.tokenizer:
        args.tokenizer.mkdir(parents=True, exist_ok=True)
        tekken = json.loads(args.tekken.read_text())
        (args.tokenizer / "tokenizer.json").write_text(json.dumps(tokenizer_json(tekken), ensure_ascii=False))
        settings = {"padding_side": "left", "truncation_side": "right", "pad_token": "<pad>"}
        (args.tokenizer / "tokenizer_config.json").write_text(json.dumps(settings))
    if args.fixture:
        args.fixture.write_text(json.dumps(fixture(args.tekken), ensure_ascii=True, separators=(",", ":")).replace('{"prompt"', '\n{"prompt"') + "\n")


if __name__ == "__main__":
    main()
