//! Which entries a run needs, and which of them are missing.
//!
//! Launcher, encoder and trainer each make the same plan from the same configuration, so nothing about entries is passed between them.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use super::entry::looks_whole;
use super::identity::{Memo, feed};
use super::record::Records;
use super::{FORMAT_VERSION, LatentEntry, TextEntry};
use crate::config::Config;
use crate::dataset::Sample;
use crate::error::{Error, Result};
use crate::model_path::ModelPaths;
use crate::slab::text_encoder::{TextModel, TextSlab};

/// Version of the chat template and system message; part of every text key.
const TEMPLATE: &str = "flux2 system message 1";
/// How an image becomes pixels: EXIF orientation, RGB, resized to cover with an antialiased bilinear filter, centre crop.
const TRANSFORM: &str = "cover bilinear centre 1";

/// The name of an entry: a hash of everything that its content depends on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Key([u8; 32]);

impl Key {
    /// The key of those bytes, for names that were read from a file or a peer.
    #[must_use]
    pub fn from_bytes(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    fn of(fields: &[&[u8]]) -> Self {
        let mut hasher = blake3::Hasher::new();
        for field in fields {
            feed(&mut hasher, field);
        }
        Self(*hasher.finalize().as_bytes())
    }

    /// The key of a caption's embedding.
    fn text(caption: &str, encoder: &str, tokenizer: &str, max_length: usize, states: [usize; 3]) -> Self {
        let numbers = format!("{max_length} {states:?}");
        Self::of(&[
            b"text",
            &FORMAT_VERSION.to_le_bytes(),
            TEMPLATE.as_bytes(),
            caption.as_bytes(),
            encoder.as_bytes(),
            tokenizer.as_bytes(),
            numbers.as_bytes(),
        ])
    }

    /// The key of an image's latent.
    fn latent(image: &str, vae: &str, resolution: u32) -> Self {
        Self::of(&[
            b"latent",
            &FORMAT_VERSION.to_le_bytes(),
            TRANSFORM.as_bytes(),
            image.as_bytes(),
            vae.as_bytes(),
            &resolution.to_le_bytes(),
        ])
    }

    /// Where the entry of this name lies.
    fn path(&self, cache_dir: &Path, kind: &str) -> PathBuf {
        let hex = self.to_string();
        cache_dir.join(kind).join(&hex[..2]).join(format!("{hex}.safetensors"))
    }
}

impl std::fmt::Display for Key {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.iter().try_for_each(|b| write!(f, "{b:02x}"))
    }
}

/// How hard a plan looks at the entries that exist.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Check {
    /// Header and size only.
    Shallow,
    /// Every byte of entries that changed since they were last verified, the stamp of the others. The default.
    Changed,
    /// Every byte of every entry.
    Deep,
}

/// A caption's embedding.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TextItem {
    /// Name.
    pub key: Key,
    /// File.
    pub path: PathBuf,
    /// Whether a whole entry is there.
    pub present: bool,
    /// The caption.
    pub caption: String,
    /// The first caption file that holds it.
    pub caption_file: PathBuf,
}

/// An image's latent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LatentItem {
    /// Name.
    pub key: Key,
    /// File.
    pub path: PathBuf,
    /// Whether a whole entry is there.
    pub present: bool,
    /// The first image file with this content.
    pub image: PathBuf,
    /// Digest of the image file's bytes ([`Memo::digest`]).
    pub image_digest: String,
}

impl TextItem {
    /// Whether a whole entry is there now: reads and verifies it.
    #[must_use]
    pub fn is_whole(&self) -> bool {
        self.path.is_file() && TextEntry::read(&self.path).is_ok()
    }
}

impl LatentItem {
    /// Whether a whole entry is there now: reads and verifies it.
    #[must_use]
    pub fn is_whole(&self) -> bool {
        self.path.is_file() && LatentEntry::read(&self.path).is_ok()
    }
}

/// The entries of one sample, as indices into [`CachePlan::text`] and [`CachePlan::latents`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PlannedSample {
    /// Index of the embedding.
    pub text: usize,
    /// Index of the latent.
    pub latent: usize,
    /// How often it counts in an epoch.
    pub repeats: usize,
}

/// Which entries a run needs, without duplicates, in the order of the samples.
#[derive(Debug, Clone)]
pub struct CachePlan {
    /// The cache folder.
    pub folder: PathBuf,
    /// Embeddings, one for each distinct caption.
    pub text: Vec<TextItem>,
    /// Latents, one for each distinct image.
    pub latents: Vec<LatentItem>,
    /// One for each sample given, in that order.
    pub samples: Vec<PlannedSample>,
    /// Hidden states that an embedding is made of.
    pub hidden_states: [usize; 3],
    /// Tokens of a padded caption.
    pub max_length: usize,
    /// Side of the image in pixels.
    pub resolution: u32,
    /// Identities of text encoder, tokenizer and VAE, as they enter the keys.
    pub identities: [String; 3],
    /// Whether the weights of text encoder and VAE are there. Without them the entries are those that they made when they were.
    pub weights_there: [bool; 2],
    /// Files that had to be opened for their digest: 0 when the memo knew all.
    pub files_hashed: usize,
}

impl CachePlan {
    /// Plans the entries of `samples` with [`Check::Changed`].
    ///
    /// # Errors
    /// As [`Self::with_check`].
    pub fn new(config: &Config, paths: &ModelPaths, samples: &[Sample]) -> Result<Self> {
        Self::with_check(config, paths, samples, Check::Changed)
    }

    /// Plans the entries of `samples`. Opens no weight file whose digest the memo knows, and decodes nothing.
    ///
    /// # Errors
    /// [`Error::Absent`] where the model has no text encoder, tokenizer or VAE (weights that an earlier plan saw may be gone), or an image
    /// cannot be read; [`Error::Config`] for hidden states that the encoder or its slab lacks; [`Error::Data`] for malformed model files and
    /// for a slab of something else.
    pub fn with_check(config: &Config, paths: &ModelPaths, samples: &[Sample], check: Check) -> Result<Self> {
        let text_encoder = TextModel::of(paths)?;
        let tokenizer = component(paths.tokenizer.as_deref(), "tokenizer", "model.tokenizer_path")?;
        let vae = component(paths.vae.as_deref(), "VAE", "model.vae_path")?;
        let folder = config.data.cache_dir.clone();
        let mut memo = Memo::open(&folder);
        let hidden_states = text_encoder.geometry()?.hidden_states(config.model.text_hidden_states)?;
        let mut records = Records::open(&folder);
        let (text_id, text_there) = match text_encoder {
            TextModel::Checkpoint(path) => records.identify(&mut memo, path, "text encoder")?,
            TextModel::Slab { slab: path, folder } => {
                let slab = TextSlab::open_beside(path, folder);
                if let Ok(slab) = &slab {
                    slab.check_states(&hidden_states)?;
                }
                records.identify_as(&mut memo, path, folder, "text encoder slab", slab.map(|s| s.identity()))?
            }
        };
        let (vae_id, vae_there) = records.identify(&mut memo, vae, "VAE")?;
        let tokenizer_id = memo.tokenizer(tokenizer)?;
        let mut this = Self {
            folder,
            text: Vec::new(),
            latents: Vec::new(),
            samples: Vec::new(),
            hidden_states,
            max_length: config.model.max_sequence_length,
            resolution: config.resolution,
            identities: [text_id, tokenizer_id, vae_id],
            weights_there: [text_there, vae_there],
            files_hashed: 0,
        };
        let (mut texts, mut latents) = (HashMap::new(), HashMap::new());
        for sample in samples {
            let [encoder, tokenizer, vae] = this.identities.clone();
            let key = Key::text(&sample.caption, &encoder, &tokenizer, this.max_length, hidden_states);
            let text = *texts.entry(key).or_insert_with(|| this.add_text(key, sample, &mut memo, check));
            let image_digest = memo.digest(&sample.image)?;
            let key = Key::latent(&image_digest, &vae, this.resolution);
            let latent = *latents.entry(key).or_insert_with(|| this.add_latent(key, sample, image_digest, &mut memo, check));
            this.samples.push(PlannedSample { text, latent, repeats: sample.repeats });
        }
        memo.save();
        records.save();
        this.files_hashed = memo.files_hashed;
        Ok(this)
    }

    fn add_text(&mut self, key: Key, sample: &Sample, memo: &mut Memo, check: Check) -> usize {
        let path = key.path(&self.folder, "text");
        let present = is_present(&path, "text", memo, check, || TextEntry::read(&path).map(drop));
        self.text.push(TextItem { key, path, present, caption: sample.caption.clone(), caption_file: sample.caption_file.clone() });
        self.text.len() - 1
    }

    fn add_latent(&mut self, key: Key, sample: &Sample, image_digest: String, memo: &mut Memo, check: Check) -> usize {
        let path = key.path(&self.folder, "latent");
        let present = is_present(&path, "latent", memo, check, || LatentEntry::read(&path).map(drop));
        self.latents.push(LatentItem { key, path, present, image: sample.image.clone(), image_digest });
        self.latents.len() - 1
    }

    /// Embeddings that must be made.
    pub fn missing_text(&self) -> impl Iterator<Item = &TextItem> {
        self.text.iter().filter(|t| !t.present)
    }

    /// Latents that must be made.
    pub fn missing_latents(&self) -> impl Iterator<Item = &LatentItem> {
        self.latents.iter().filter(|l| !l.present)
    }

    /// Whether nothing is missing.
    #[must_use]
    pub fn is_complete(&self) -> bool {
        self.missing_text().next().is_none() && self.missing_latents().next().is_none()
    }

    /// Reads the embedding `text` (an index of [`PlannedSample`]).
    ///
    /// # Errors
    /// As [`TextEntry::read`]. A corrupt entry is set aside, so that the next run of the encoder makes it again.
    pub fn read_text(&self, text: usize) -> Result<TextEntry> {
        let item = self.text.get(text).ok_or_else(|| Error::invariant("a sample names an embedding that is not planned").found(text))?;
        TextEntry::read(&item.path).map_err(|e| set_aside(&item.path, e))
    }

    /// Reads the latent `latent` (an index of [`PlannedSample`]).
    ///
    /// # Errors
    /// As [`LatentEntry::read`]. A corrupt entry is set aside, so that the next run of the encoder makes it again.
    pub fn read_latent(&self, latent: usize) -> Result<LatentEntry> {
        let item = self.latents.get(latent).ok_or_else(|| Error::invariant("a sample names a latent that is not planned").found(latent))?;
        LatentEntry::read(&item.path).map_err(|e| set_aside(&item.path, e))
    }
}

fn component<'a>(path: Option<&'a Path>, what: &str, key: &str) -> Result<&'a Path> {
    path.ok_or_else(|| {
        Error::absent(format!("the model has no {what}"))
            .advice(format!("set {key} in the configuration, or point model.path at a folder in the Hugging Face layout"))
    })
}

fn is_present(path: &Path, kind: &str, memo: &mut Memo, check: Check, read: impl Fn() -> Result<()>) -> bool {
    let verify = || match read() {
        Ok(()) => true,
        Err(e) => {
            tracing::warn!("it counts as missing: {e}");
            false
        }
    };
    match check {
        Check::Shallow => looks_whole(path, kind),
        Check::Changed => memo.verified(path, verify).unwrap_or(false),
        Check::Deep => path.is_file() && verify(),
    }
}

/// A corrupt entry whose time stamps did not change would be believed whole by the next plan's memo: rename it out of the way.
fn set_aside(path: &Path, error: Error) -> Error {
    if matches!(error, Error::Data(_)) {
        let aside = path.with_extension("corrupt");
        match std::fs::rename(path, &aside) {
            Ok(()) => tracing::warn!("the corrupt entry was renamed to {}", aside.display()),
            Err(e) => tracing::warn!("the corrupt entry {} cannot be renamed: {e}", path.display()),
        }
    }
    error
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::*;

    #[test]
    fn every_part_of_a_key_changes_it() {
        let text = |c: &str, e: &str, t: &str, n, s| Key::text(c, e, t, n, s);
        let latent = Key::latent;
        let keys = [
            text("a", "b", "c", 5, [1, 2, 3]),
            text("ab", "", "c", 5, [1, 2, 3]),
            text("a", "bc", "", 5, [1, 2, 3]),
            text("a", "b", "c", 6, [1, 2, 3]),
            text("a", "b", "c", 5, [1, 2, 4]),
            text("a", "b", "c", 51, [2, 3, 0]),
            latent("a", "b", 5),
            latent("ab", "", 5),
            latent("a", "b", 6),
        ];
        for (i, key) in keys.iter().enumerate() {
            assert!(!keys[..i].contains(key), "key {i} equals an earlier one");
        }
        let path = keys[0].path(Path::new("cache"), "text");
        let hex = keys[0].to_string();
        assert_eq!(path, Path::new("cache/text").join(&hex[..2]).join(format!("{hex}.safetensors")));
    }
}
