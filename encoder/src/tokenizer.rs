//! Captions to token ids, as the reference does it (`spec/flux2.md` 2.1).
//!
//! The tokenizer is the shipped `tokenizer.json`, used as it is: its pre-tokenizer differs from Tekken's in some words, and so do the ids that
//! FLUX.2 was trained with. The chat template is rendered here and carries its own `<s>`, so no special tokens are added. Pads stand on
//! the left: the real tokens take the last positions, which the rotary embedding sees. A tokenizer that pads right is refused, because
//! everything behind would be computed for another model.

use std::path::{Path, PathBuf};

use serde::Deserialize;
use serenity_protocol::{Error, Result};

/// The system message that FLUX.2 was trained with. The line break is part of it.
pub const SYSTEM_MESSAGE: &str = "You are an AI that reasons about image descriptions. You give structured responses focusing on object relationships, object\nattribution and actions without speculation.";

/// The placeholder that is deleted from captions: the text encoder would expect an image there.
const IMAGE_TOKEN: &str = "[IMG]";

/// The tokens of one caption, without pads.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tokens {
    /// Ids, at most `max_length`, at least one.
    pub ids: Vec<u32>,
    /// How many tokens were cut off.
    pub cut: usize,
}

/// The shipped tokenizer.
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    file: PathBuf,
    pad_id: u32,
    cut_left: bool,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum TokenText {
    Plain(String),
    Added { content: String },
}

#[derive(Deserialize)]
struct TokenizerConfig {
    padding_side: Option<String>,
    truncation_side: Option<String>,
    pad_token: Option<TokenText>,
}

/// The rendered chat template.
#[must_use]
pub fn render(caption: &str) -> String {
    format!("<s>[SYSTEM_PROMPT]{SYSTEM_MESSAGE}[/SYSTEM_PROMPT][INST]{}[/INST]", caption.replace(IMAGE_TOKEN, ""))
}

impl Tokenizer {
    /// Opens the tokenizer folder.
    ///
    /// # Errors
    /// [`Error::Absent`] for missing files; [`Error::Data`] if they are malformed, pad on the right, or know no pad token.
    pub fn open(folder: &Path) -> Result<Self> {
        let config_file = folder.join("tokenizer_config.json");
        let text =
            std::fs::read_to_string(&config_file).map_err(|e| Error::io("cannot read the tokenizer's configuration", &config_file, e))?;
        let config: TokenizerConfig =
            serde_json::from_str(&text).map_err(|e| Error::data("the tokenizer's configuration is malformed").at(&config_file).cause(e))?;
        if config.padding_side.as_deref() != Some("left") {
            return Err(Error::data("the tokenizer does not pad on the left, as FLUX.2 [dev]'s must")
                .at(&config_file)
                .expected("\"padding_side\": \"left\"")
                .found(config.padding_side.unwrap_or_else(|| "no padding_side".into()))
                .advice("use the tokenizer/ folder of the FLUX.2 [dev] repository"));
        }
        let cut_left = match config.truncation_side.as_deref() {
            None | Some("right") => false,
            Some("left") => true,
            Some(other) => return Err(Error::data("truncation_side must be left or right").at(&config_file).found(other)),
        };
        let file = folder.join("tokenizer.json");
        if !file.is_file() {
            return Err(Error::absent("the tokenizer is missing").at(&file).advice("download the tokenizer/ folder of the model again"));
        }
        let mut inner =
            tokenizers::Tokenizer::from_file(&file).map_err(|e| Error::data("the tokenizer cannot be read").at(&file).cause(e))?;
        // A tokenizer.json may carry a length and padding of its own: ours come from the configuration.
        inner.with_padding(None);
        inner.with_truncation(None).map_err(|e| Error::data("the tokenizer's truncation cannot be switched off").at(&file).cause(e))?;
        let pad = match config.pad_token {
            None => "<pad>".to_string(),
            Some(TokenText::Plain(text) | TokenText::Added { content: text }) => text,
        };
        let pad_id = inner.token_to_id(&pad).ok_or_else(|| Error::data(format!("the tokenizer has no pad token '{pad}'")).at(&file))?;
        Ok(Self { inner, file, pad_id, cut_left })
    }

    /// Id of the pad token.
    #[must_use]
    pub fn pad_id(&self) -> u32 {
        self.pad_id
    }

    /// The tokens of `caption` in the chat template, cut to `max_length` (template included) as the reference cuts.
    ///
    /// # Errors
    /// [`Error::Data`] if the tokenizer fails on it.
    pub fn encode(&self, caption: &str, max_length: usize) -> Result<Tokens> {
        let encoding = self
            .inner
            .encode_fast(render(caption), false)
            .map_err(|e| Error::data("the tokenizer failed on a caption").at(&self.file).cause(e))?;
        let ids = encoding.get_ids();
        let cut = ids.len().saturating_sub(max_length);
        let kept = if self.cut_left { ids.get(cut..) } else { ids.get(..ids.len() - cut) };
        match kept {
            Some(kept) if !kept.is_empty() => Ok(Tokens { ids: kept.to_vec(), cut }),
            _ => Err(Error::data("the tokenizer gives no tokens").at(&self.file).expected("at least one")),
        }
    }
}
