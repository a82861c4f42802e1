//! The shape of the text encoder, from its `config.json`.
//!
//! Two layouts are accepted: the multimodal one (`text_config` inside, as FLUX.2 (dev) ships) and the text-only one. Everything that
//! the forward pass needs is read here; what it cannot compute (a sliding window, scaled rotary frequencies, another activation) is
//! refused rather than ignored.
#![forbid(unsafe_code)]

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// Geometry of a Mistral text encoder (`spec/flux2.md` 2.3).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TextGeometry {
    /// Layers in the checkpoint.
    pub layers: usize,
    /// Features of a hidden state.
    pub hidden: usize,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads; divides `heads`.
    pub kv_heads: usize,
    /// Features of a head (`heads * head_dim` need not be `hidden`).
    pub head_dim: usize,
    /// Width of the feed-forward layer.
    pub intermediate: usize,
    /// Rows of the embedding.
    pub vocab: usize,
    /// Epsilon of every RMS norm.
    pub rms_eps: f64,
    /// Base of the rotary frequencies.
    pub rope_theta: f64,
}

#[derive(Deserialize)]
struct Rope {
    rope_theta: Option<f64>,
    #[serde(alias = "type")]
    rope_type: Option<String>,
}

#[derive(Deserialize)]
struct TextConfig {
    num_hidden_layers: usize,
    hidden_size: usize,
    num_attention_heads: usize,
    num_key_value_heads: Option<usize>,
    head_dim: Option<usize>,
    intermediate_size: usize,
    vocab_size: usize,
    #[serde(default = "default_eps")]
    rms_norm_eps: f64,
    rope_theta: Option<f64>,
    rope_parameters: Option<Rope>,
    rope_scaling: Option<Rope>,
    #[serde(default = "default_act")]
    hidden_act: String,
    sliding_window: Option<usize>,
}

fn default_eps() -> f64 {
    1e-6
}
fn default_act() -> String {
    "silu".into()
}

/// Base of the rotary frequencies where the configuration names none: the default of the reference's configuration class.
const ROPE_THETA_DEFAULT: f64 = 10_000.0;

impl TextGeometry {
    /// Reads `config.json` of the text encoder at `path` (its folder, or a weight file beside it).
    ///
    /// # Errors
    /// [`Error::Absent`] if it cannot be read; [`Error::Data`] if it is not that of a Mistral text encoder that can be run here.
    pub fn read(path: &Path) -> Result<Self> {
        let file = config_file(path);
        let text = std::fs::read_to_string(&file).map_err(|e| Error::io("cannot read the text encoder's configuration", &file, e))?;
        Self::parse(&text).map_err(|e| e.at(&file))
    }

    fn parse(text: &str) -> Result<Self> {
        let malformed =
            |e: serde_json::Error| Error::data("the text encoder's configuration is not that of a Mistral text encoder").cause(e);
        let mut root: serde_json::Value = serde_json::from_str(text).map_err(malformed)?;
        let inner = root.get_mut("text_config").map(serde_json::Value::take).unwrap_or(root);
        let c: TextConfig = serde_json::from_value(inner).map_err(malformed)?;
        let heads = c.num_attention_heads;
        let rope_type = |r: &Option<Rope>| r.as_ref().and_then(|r| r.rope_type.clone()).unwrap_or_else(|| "default".into());
        for (what, found, expected) in [
            ("activation", c.hidden_act.clone(), "silu"),
            ("rope type", rope_type(&c.rope_parameters), "default"),
            ("rope scaling", rope_type(&c.rope_scaling), "default"),
            ("sliding window", c.sliding_window.map_or("none".into(), |w| w.to_string()), "none"),
        ] {
            if found != expected {
                return Err(Error::data(format!("this text encoder has a {what} that is not supported")).expected(expected).found(found));
            }
        }
        let this = Self {
            layers: c.num_hidden_layers,
            hidden: c.hidden_size,
            heads,
            kv_heads: c.num_key_value_heads.unwrap_or(heads),
            head_dim: c.head_dim.unwrap_or(c.hidden_size.checked_div(heads).unwrap_or(0)),
            intermediate: c.intermediate_size,
            vocab: c.vocab_size,
            rms_eps: c.rms_norm_eps,
            rope_theta: c.rope_parameters.and_then(|r| r.rope_theta).or(c.rope_theta).unwrap_or(ROPE_THETA_DEFAULT),
        };
        this.check()?;
        Ok(this)
    }

    /// Refuses sizes that no text encoder has.
    pub(crate) fn check(&self) -> Result<()> {
        for (name, value, max) in [
            ("num_hidden_layers", self.layers, 1 << 12),
            ("hidden_size", self.hidden, 1 << 20),
            ("num_attention_heads", self.heads, 1 << 12),
            ("num_key_value_heads", self.kv_heads, 1 << 12),
            ("head_dim", self.head_dim, 1 << 12),
            ("intermediate_size", self.intermediate, 1 << 22),
            ("vocab_size", self.vocab, 1 << 28),
        ] {
            if value == 0 || value > max {
                return Err(Error::data(format!("{name} is {value}, expected 1 to {max}")));
            }
        }
        if !self.heads.is_multiple_of(self.kv_heads) || !self.head_dim.is_multiple_of(2) {
            return Err(Error::data(format!(
                "num_key_value_heads {} must divide num_attention_heads {}, and head_dim {} must be even",
                self.kv_heads, self.heads, self.head_dim
            )));
        }
        if !(self.rms_eps > 0.0 && self.rope_theta > 1.0) {
            return Err(Error::data(format!("rms_norm_eps {} and rope_theta {} must be positive", self.rms_eps, self.rope_theta)));
        }
        Ok(())
    }

    /// The hidden states that make an embedding: `chosen`, or a quarter, a half and three quarters of the depth (10, 20, 30 of dev's 40).
    ///
    /// State 0 is the embedding, state i the residual stream after i layers. The state after the last layer is refused: the reference
    /// gives it normed, the others not.
    ///
    /// # Errors
    /// [`Error::Config`] for a state that the encoder does not have.
    pub fn hidden_states(&self, chosen: Option<[usize; 3]>) -> Result<[usize; 3]> {
        let states = chosen.unwrap_or([self.layers / 4, self.layers / 2, self.layers * 3 / 4]);
        if let Some(beyond) = states.iter().find(|&&s| s >= self.layers) {
            return Err(Error::config("model.text_hidden_states names a state that the text encoder does not have")
                .expected(format!("0 to {}, of {} layers", self.layers - 1, self.layers))
                .found(beyond));
        }
        Ok(states)
    }

    /// Features of an embedded token: three hidden states side by side.
    #[must_use]
    pub fn features(&self) -> usize {
        3 * self.hidden
    }

    /// Weights of one layer.
    #[must_use]
    pub fn layer_params(&self) -> usize {
        let (d, h) = (self.hidden, self.head_dim);
        2 * self.heads * h * d + 2 * self.kv_heads * h * d + 3 * self.intermediate * d + 2 * d
    }
}

/// `config.json` of the component at `path`: in the folder, or beside the file.
#[must_use]
pub fn config_file(path: &Path) -> PathBuf {
    if path.is_file() { path.with_file_name("config.json") } else { path.join("config.json") }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::*;

    const DEV: &str = r#"{"text_config": {"num_hidden_layers": 40, "hidden_size": 5120, "num_attention_heads": 32, "num_key_value_heads": 8,
        "head_dim": 128, "intermediate_size": 32768, "vocab_size": 131072, "rms_norm_eps": 1e-5, "rope_theta": 1000000000.0, "sliding_window": null}}"#;

    #[test]
    fn dev_geometry_has_the_specified_size_and_states() {
        let g = TextGeometry::parse(DEV).unwrap();
        assert_eq!(g.layer_params(), 555_755_520, "spec 2.3");
        assert_eq!(g.hidden_states(None).unwrap(), [10, 20, 30]);
        assert_eq!((g.features(), g.rope_theta), (15360, 1e9));
        assert_eq!(g.hidden_states(Some([0, 39, 40])).unwrap_err().exit_code(), 64);
    }

    #[test]
    fn both_layouts_and_both_places_of_theta_are_read() {
        let inner = DEV.split_once(": {").map(|(_, rest)| format!("{{{}", rest.strip_suffix('}').unwrap())).unwrap();
        assert_eq!(TextGeometry::parse(&inner).unwrap(), TextGeometry::parse(DEV).unwrap());
        let moved =
            DEV.replace(r#""rope_theta": 1000000000.0"#, r#""rope_parameters": {"rope_theta": 1000000000.0, "rope_type": "default"}"#);
        assert_eq!(TextGeometry::parse(&moved).unwrap(), TextGeometry::parse(DEV).unwrap());
    }

    #[test]
    fn what_cannot_be_computed_is_refused() {
        for (from, to) in [
            (r#""sliding_window": null"#, r#""sliding_window": 4096"#),
            (r#""rope_theta": 1000000000.0"#, r#""rope_scaling": {"rope_type": "yarn"}"#),
            (r#""head_dim": 128"#, r#""head_dim": 127"#),
            (r#""num_key_value_heads": 8"#, r#""num_key_value_heads": 5"#),
            (r#""hidden_size": 5120"#, r#""hidden_size": 0"#),
        ] {
            assert_eq!(TextGeometry::parse(&DEV.replace(from, to)).unwrap_err().exit_code(), 65, "{to}");
        }
    }
}
