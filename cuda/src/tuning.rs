//! How the engine's work is laid over its streams: none of it changes a result, except where a product's size says otherwise.
//!
//! The defaults are what was measured best (`docs/performance.md`). Other values are for measuring: `SERENITY_TUNING` holds them as
//! `name=value` pairs, separated by commas, e.g. `side=high,blocks=16,sms=116`.
#![forbid(unsafe_code)]

use std::str::FromStr;

use serenity_protocol::{Error, Result};

/// The stream that brings INT8 weights into the activations' type.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Side {
    /// The compute stream itself: nothing overlaps.
    #[default]
    Off,
    /// A stream of its own whose blocks go behind those of products.
    Low,
    /// A stream of its own whose blocks go before those of products.
    High,
}

/// Half of the largest matrix of FLUX.2 [dev]: in three pieces its input gradient fills three quarters of an H100, whole it takes the memory of the
/// slots that keep the bus busy with 6 GiB.
const PIECE: usize = 55_296 * 6144 / 2;

/// The choices.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tuning {
    /// Where dequantisation runs.
    pub side: Side,
    /// Thread blocks of a dequantisation beside products, each with a multiprocessor's threads to itself; 0 for as many as there is work.
    pub blocks: u32,
    /// Multiprocessors that large products are planned for; 0 for all. Changes the algorithm, and with it last bits.
    pub multiprocessors: u32,
    /// Whether a dequantised matrix is used again within its visit, as long as its memory is not needed.
    pub keep: bool,
    /// Whether an adapter's second matrix stands beside the frozen one in one product. Changes last bits.
    pub join: bool,
    /// Elements of the largest piece of a matrix that is multiplied at once. Changes last bits.
    pub piece: usize,
    /// MiB for dequantised matrices instead of the plan's choice; 0 for that.
    pub ring_mib: usize,
}

impl Default for Tuning {
    fn default() -> Self {
        Self { side: Side::Off, blocks: 0, multiprocessors: 0, keep: true, join: true, piece: PIECE, ring_mib: 0 }
    }
}

impl Tuning {
    /// The defaults, changed by `SERENITY_TUNING`.
    ///
    /// # Errors
    /// [`Error::Config`] for a value that makes no sense.
    pub fn from_environment() -> Result<Self> {
        std::env::var("SERENITY_TUNING").map_or_else(|_| Ok(Self::default()), |text| text.parse())
    }
}

impl FromStr for Tuning {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let mut tuning = Self::default();
        for pair in text.split(',').map(str::trim).filter(|p| !p.is_empty()) {
            let wrong = || {
                Error::config(format!("'{pair}' is no tuning"))
                    .expected("side=off|low|high, blocks=N, sms=N, keep=0|1, join=0|1, piece=ELEMENTS, ring=MIB")
            };
            let (name, value) = pair.split_once('=').ok_or_else(wrong)?;
            let number = || value.parse::<usize>().map_err(|_| wrong());
            let small = || value.parse::<u32>().map_err(|_| wrong());
            match (name, value) {
                ("side", "off") => tuning.side = Side::Off,
                ("side", "low") => tuning.side = Side::Low,
                ("side", "high") => tuning.side = Side::High,
                ("blocks", _) => tuning.blocks = small()?,
                ("sms", _) => tuning.multiprocessors = small()?,
                ("keep", "0") => tuning.keep = false,
                ("keep", "1") => tuning.keep = true,
                ("join", "0") => tuning.join = false,
                ("join", "1") => tuning.join = true,
                ("piece", _) => tuning.piece = number()?.max(1),
                ("ring", _) => tuning.ring_mib = number()?,
                _ => return Err(wrong()),
            }
        }
        Ok(tuning)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::*;

    #[test]
    fn pairs_are_read_and_nonsense_is_refused() {
        let tuning: Tuning = "side=high, blocks=16,sms=116,keep=0,join=0,piece=1000,ring=64".parse().unwrap();
        let expected = Tuning { side: Side::High, blocks: 16, multiprocessors: 116, keep: false, join: false, piece: 1000, ring_mib: 64 };
        assert_eq!(tuning, expected);
        assert_eq!("".parse::<Tuning>().unwrap(), Tuning::default());
        for bad in ["side", "side=up", "blocks=-1", "keep=2", "speed=9"] {
            assert_eq!(bad.parse::<Tuning>().unwrap_err().exit_code(), 64, "{bad}");
        }
    }
}
