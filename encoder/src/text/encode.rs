//! All captions of a pass through one layer, then the next.
//!
//! A thread reads layer i + 1 while layer i computes; it may hold one layer ready, so that two are in memory at most. Captions are
//! computed one by one with their exact lengths: nothing is padded, and a caption's result does not depend on its neighbours.

use std::collections::HashMap;
use std::path::Path;
use std::sync::mpsc::{Receiver, sync_channel};
use std::time::{Duration, Instant};

use candle_core::{DType, Device, Tensor};
use half::bf16;
use serenity_protocol::cache::TextEntry;
use serenity_protocol::cache::text_model::TextGeometry;
use serenity_protocol::checkpoint::Checkpoint;
use serenity_protocol::{Error, Result};

use super::layer::{Positions, forward};
use super::weights::{LayerWeights, TextWeights};
use crate::tensor::failed;
use crate::tokenizer::Tokens;

/// A text encoder whose weights stay on disk.
pub struct TextEncoder {
    weights: TextWeights,
    geometry: TextGeometry,
    device: Device,
    dtype: DType,
}

/// The chosen hidden states of some rows side by side, on the host.
pub struct Embedding {
    /// `[n, 3 * hidden]` in the type asked for.
    pub rows: Tensor,
}

/// What a pass gives.
pub struct Encoded {
    /// One for each caption given, in that order.
    pub captions: Vec<Embedding>,
    /// The one row of every pad.
    pub pad: Embedding,
    /// Where the time went.
    pub times: EncodeTimes,
}

/// Where the time of a pass went.
#[derive(Debug, Clone, Copy, Default)]
pub struct EncodeTimes {
    /// Reading layers, in the background.
    pub read: Duration,
    /// Waiting for a layer that was not read yet.
    pub wait: Duration,
    /// Computing.
    pub compute: Duration,
    /// Weights that were read.
    pub weight_params: u64,
    /// Multiply-adds times two, of the linear layers.
    pub flops: f64,
}

impl Embedding {
    fn values(&self) -> Result<Vec<bf16>> {
        self.rows.to_dtype(DType::BF16).and_then(|t| t.flatten_all()?.to_vec1()).map_err(failed("reading an embedding"))
    }

    /// The cache entry of a caption, with the row of its pads.
    ///
    /// # Errors
    /// A failure of the tensor library.
    pub fn to_entry(&self, pad: &Embedding, max_length: usize) -> Result<TextEntry> {
        let (real_tokens, features) = self.rows.dims2().map_err(failed("reading an embedding"))?;
        Ok(TextEntry { real_tokens, max_length, features, rows: self.values()?, pad_row: pad.values()? })
    }
}

/// A caption or the pad on its way through the layers.
struct Traveller {
    state: Tensor,
    /// Index of its [`Positions`] (the number of tokens); `None` for the pad.
    tokens: Option<usize>,
    kept: [Option<Tensor>; 3],
}

impl Traveller {
    /// Keeps the state if it is one of those asked for.
    fn keep(&mut self, index: usize, states: [usize; 3], keep: DType) -> candle_core::Result<()> {
        for (slot, _) in self.kept.iter_mut().zip(states).filter(|(_, s)| *s == index) {
            *slot = Some(self.state.to_dtype(keep)?.to_device(&Device::Cpu)?);
        }
        Ok(())
    }

    fn finish(self) -> Result<Embedding> {
        let [Some(a), Some(b), Some(c)] = self.kept else { return Err(Error::invariant("a hidden state was not kept")) };
        Tensor::cat(&[a, b, c], 1).map(|rows| Embedding { rows }).map_err(failed("joining hidden states"))
    }
}

impl TextEncoder {
    /// Opens the text encoder at `path` (folder or file). Reads no weights yet.
    ///
    /// # Errors
    /// [`Error::Absent`] for missing files, [`Error::Data`] for files that are no Mistral text encoder.
    pub fn open(path: &Path, device: Device, dtype: DType) -> Result<Self> {
        let geometry = TextGeometry::read(path)?;
        let weights = TextWeights::new(Checkpoint::open(path)?, geometry.clone())?;
        Ok(Self { weights, geometry, device, dtype })
    }

    /// Its geometry.
    #[must_use]
    pub fn geometry(&self) -> &TextGeometry {
        &self.geometry
    }

    /// Bytes that a token of a pass keeps in memory: its running state and the kept ones in type `keep`.
    #[must_use]
    pub fn bytes_per_token(&self, keep: DType) -> usize {
        self.geometry.hidden * self.dtype.size_in_bytes() + self.geometry.features() * keep.size_in_bytes()
    }

    /// Runs `captions` through the encoder in one pass over the weights. `max_length` gives the real tokens their positions (the last
    /// ones); `keep` is the type of the result. `progress` is called after every caption of every layer with (done, total) and
    /// ends the pass by returning an error.
    ///
    /// # Errors
    /// What `progress` returns; [`Error::Data`] for malformed weights; failures of the device.
    pub fn encode(
        &self,
        captions: &[Tokens],
        pad_id: u32,
        states: [usize; 3],
        max_length: usize,
        keep: DType,
        progress: &mut dyn FnMut(u64, u64) -> Result<()>,
    ) -> Result<Encoded> {
        let depth = states.into_iter().max().unwrap_or(0);
        let mut travellers = self.depart(captions, pad_id, states, keep)?;
        let positions = self.positions(captions, max_length)?;
        let mut times = EncodeTimes::default();
        std::thread::scope(|scope| {
            // Rendezvous: the reader holds one finished layer until it is taken, then reads the next.
            let (sender, receiver) = sync_channel(0);
            let reader = std::thread::Builder::new().name("layer reader".into());
            reader
                .spawn_scoped(scope, move || {
                    for layer in 0..depth {
                        let started = Instant::now();
                        let read = self.weights.layer(layer, &self.device, self.dtype).map(|w| (w, started.elapsed()));
                        let stop = read.is_err();
                        // A send fails when the pass ended early: nobody needs the layer.
                        if sender.send(read).is_err() || stop {
                            return;
                        }
                    }
                })
                .map_err(|e| Error::absent("cannot start a thread").cause(e))?;
            let mut done = 0;
            let total = (depth * captions.len()) as u64;
            for layer in 0..depth {
                let weights = next_layer(&receiver, &mut times)?;
                times.weight_params += self.geometry.layer_params() as u64;
                let started = Instant::now();
                let _span = tracing::trace_span!("encode layer", layer, captions = captions.len()).entered();
                for traveller in &mut travellers {
                    let at = traveller.tokens.and_then(|n| positions.get(&n));
                    traveller.state =
                        forward(&self.geometry, &weights, &traveller.state, at).map_err(failed("a layer of the text encoder"))?;
                    traveller.keep(layer + 1, states, keep).map_err(failed("keeping a hidden state"))?;
                    if let Some(n) = traveller.tokens {
                        done += 1;
                        times.flops += 2.0 * self.geometry.layer_params() as f64 * n as f64;
                        progress(done, total)?;
                    }
                }
                times.compute += started.elapsed();
            }
            Ok::<(), Error>(())
        })?;
        let pad = travellers.pop().ok_or_else(|| Error::invariant("the pad is missing from its pass"))?.finish()?;
        Ok(Encoded { captions: travellers.into_iter().map(Traveller::finish).collect::<Result<_>>()?, pad, times })
    }

    /// Embeds all captions and, last, the pad.
    fn depart(&self, captions: &[Tokens], pad_id: u32, states: [usize; 3], keep: DType) -> Result<Vec<Traveller>> {
        let pad = Tokens { ids: vec![pad_id], cut: 0 };
        let mut travellers = Vec::with_capacity(captions.len() + 1);
        for (index, tokens) in captions.iter().chain([&pad]).enumerate() {
            let state = self.weights.embed(&tokens.ids, &self.device, self.dtype)?;
            let length = (index < captions.len()).then_some(tokens.ids.len());
            let mut traveller = Traveller { state, tokens: length, kept: [None, None, None] };
            traveller.keep(0, states, keep).map_err(failed("keeping a hidden state"))?;
            travellers.push(traveller);
        }
        Ok(travellers)
    }

    /// One table for each distinct length.
    fn positions(&self, captions: &[Tokens], max_length: usize) -> Result<HashMap<usize, Positions>> {
        let mut positions = HashMap::new();
        for n in captions.iter().map(|c| c.ids.len()) {
            let offset = max_length.checked_sub(n).ok_or_else(|| Error::invariant("a caption is longer than max_length").found(n))?;
            if let std::collections::hash_map::Entry::Vacant(free) = positions.entry(n) {
                let made = Positions::new(&self.geometry, n, offset, &self.device, self.dtype);
                free.insert(made.map_err(failed("building the rotary table"))?);
            }
        }
        Ok(positions)
    }
}

fn next_layer(receiver: &Receiver<Result<(LayerWeights, Duration)>>, times: &mut EncodeTimes) -> Result<LayerWeights> {
    let started = Instant::now();
    let _span = tracing::trace_span!("layer wait").entered();
    let (weights, read) = receiver.recv().map_err(|_| Error::invariant("the layer reader ended early"))??;
    times.wait += started.elapsed();
    times.read += read;
    Ok(weights)
}
