//! All captions of a pass through one layer, then the next.
//!
//! A thread reads layer i + 1 while layer i computes; it may hold one layer ready, so that two are in memory at most. Captions are packed
//! one behind the other without padding into packs of about [`PACK_ROWS`] tokens, so that a product has many rows and activations stay
//! bounded; a pack is filled up to a multiple of [`ROWS_UNIT`] rows, so that products of any two packs add up a row in the same order and
//! a caption's result does not depend on its neighbours, bit for bit on the CPU. Between two layers a pack's states wait in memory or in a
//! file ([`Hidden`]).

use std::collections::HashMap;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::mpsc::{Receiver, sync_channel};
use std::time::{Duration, Instant};

use candle_core::{DType, Device, Tensor};
use half::bf16;
use serenity_cuda::Ty;
use serenity_protocol::cache::TextEntry;
use serenity_protocol::cache::text_model::TextGeometry;
use serenity_protocol::slab::text_encoder::TextModel;
use serenity_protocol::{Error, Result};

use super::direct::{DIRECT_FILE_BYTES_MIN, DirectReader};
use super::hidden::HiddenStore;
use super::layer::{Positions, Segment, forward};
use super::weights::{LayerWeights, TextWeights};
use crate::tensor::failed;
use crate::tokenizer::Tokens;

/// Tokens of a pack, unless one caption alone has more.
const PACK_ROWS: usize = 1024;
/// A pack has a multiple of this many rows. Above 64 rows the CPU's matrix product blocks a sum in the same way for any number of them.
const ROWS_UNIT: usize = 128;

/// Where hidden states wait between two layers.
#[derive(Debug, Clone)]
pub enum Hidden {
    /// In memory.
    Memory,
    /// In a nameless file in this folder.
    File(PathBuf),
}

/// What to compute.
#[derive(Debug, Clone)]
pub struct Task {
    /// Indices of the hidden states that make an embedding.
    pub states: [usize; 3],
    /// Tokens of a padded caption: gives the real tokens their positions, which are the last ones.
    pub max_length: usize,
    /// Type of the result.
    pub keep: DType,
    /// Where hidden states wait.
    pub hidden: Hidden,
}

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
    /// Multiply-adds times two, of the linear layers.
    pub flops: f64,
    /// Taking device memory and embedding the captions, on a device; the first layers are read meanwhile.
    pub setup: Duration,
    /// Bytes of the layers in the files.
    pub weight_bytes: u64,
    /// Bytes of device memory beside the context by the driver's figure, on a device.
    pub device_bytes: Option<u64>,
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

/// Captions on their way through the layers, packed.
pub(super) struct Pack {
    /// Which captions.
    pub captions: Range<usize>,
    /// Number of tokens of each.
    pub lengths: Vec<usize>,
}

impl Pack {
    fn rows(&self) -> usize {
        self.lengths.iter().sum()
    }

    /// Each caption's first row and rows.
    fn segments(&self) -> impl Iterator<Item = (usize, usize)> {
        self.lengths.iter().scan(0, |start, &rows| {
            let at = *start;
            *start += rows;
            Some((at, rows))
        })
    }
}

/// Neighbours together, up to `most` rows; one caption alone may have more.
pub(super) fn packs(captions: &[Tokens], most: usize) -> Vec<Pack> {
    let mut packs: Vec<Pack> = Vec::new();
    for (index, rows) in captions.iter().map(|c| c.ids.len()).enumerate() {
        match packs.last_mut().filter(|p| p.rows() + rows <= most) {
            Some(pack) => {
                pack.captions.end = index + 1;
                pack.lengths.push(rows);
            }
            None => packs.push(Pack { captions: index..index + 1, lengths: vec![rows] }),
        }
    }
    packs
}

/// Slot of a pack's running state; 0 to 2 are the kept ones.
const RUNNING: usize = 3;

/// One pass: the packs' states and what they are computed with.
struct Pass<'a> {
    encoder: &'a TextEncoder,
    task: &'a Task,
    packs: Vec<Pack>,
    positions: HashMap<usize, Positions>,
    store: HiddenStore,
    /// The pad's running state and kept ones: one row, which every pad of every caption shares.
    pad: Tensor,
    pad_kept: [Option<Tensor>; 3],
}

impl Pass<'_> {
    fn embed(&mut self, captions: &[Tokens]) -> Result<()> {
        let e = self.encoder;
        for index in 0..self.packs.len() {
            let Some(pack) = self.packs.get(index) else { break };
            let ids: Vec<u32> =
                captions.get(pack.captions.clone()).unwrap_or_default().iter().flat_map(|c| c.ids.iter().copied()).collect();
            let filling = ids.len().next_multiple_of(ROWS_UNIT) - ids.len();
            let state = e.weights.embed(&ids, &e.device, e.dtype)?;
            let state = state.pad_with_zeros(0, 0, filling).map_err(failed("packing captions"))?;
            self.keep(index, &state, 0)?;
            self.store.put((index, RUNNING), &state)?;
        }
        self.keep_pad(0)
    }

    /// Keeps the state if it is one of those asked for.
    fn keep(&mut self, pack: usize, state: &Tensor, index: usize) -> Result<()> {
        let rows = self.packs.get(pack).map_or(0, Pack::rows);
        for slot in (0..3).filter(|s| self.task.states.get(*s) == Some(&index)) {
            let kept = state.narrow(0, 0, rows).and_then(|t| t.to_dtype(self.task.keep)?.to_device(&Device::Cpu)?.force_contiguous());
            self.store.put((pack, slot), &kept.map_err(failed("keeping a hidden state"))?)?;
        }
        Ok(())
    }

    fn keep_pad(&mut self, index: usize) -> Result<()> {
        for (slot, _) in self.pad_kept.iter_mut().zip(self.task.states).filter(|(_, s)| *s == index) {
            let kept = self.pad.to_dtype(self.task.keep).and_then(|t| t.to_device(&Device::Cpu));
            *slot = Some(kept.map_err(failed("keeping a hidden state"))?);
        }
        Ok(())
    }

    fn pad_layer(&mut self, layer: usize, weights: &LayerWeights) -> Result<()> {
        self.pad = forward(&self.encoder.geometry, weights, &self.pad, &[]).map_err(failed("a layer of the text encoder"))?;
        self.keep_pad(layer + 1)
    }

    /// One pack through one layer.
    fn pack_layer(&mut self, index: usize, layer: usize, weights: &LayerWeights) -> Result<usize> {
        let state = self.store.take((index, RUNNING), &self.encoder.device)?;
        let Some(pack) = self.packs.get(index) else { return Ok(0) };
        let place = |(start, rows)| Some(Segment { start, rows, positions: self.positions.get(&rows)? });
        let segments: Vec<Segment> = pack.segments().filter_map(place).collect();
        if segments.len() != pack.lengths.len() {
            return Err(Error::invariant("a caption has no rotary table"));
        }
        let (rows, state) = (pack.rows(), forward(&self.encoder.geometry, weights, &state, &segments));
        let state = state.map_err(failed("a layer of the text encoder"))?;
        self.keep(index, &state, layer + 1)?;
        self.store.put((index, RUNNING), &state)?;
        Ok(rows)
    }

    /// Hands every caption's embedding to `sink`.
    fn finish(mut self, sink: &mut dyn FnMut(usize, Embedding, &Embedding) -> Result<()>) -> Result<()> {
        let pad = self.pad_kept.into_iter().flatten().collect::<Vec<_>>();
        let join = |parts: &[Tensor]| match parts {
            [_, _, _] => Tensor::cat(parts, 1).map(|rows| Embedding { rows }).map_err(failed("joining hidden states")),
            _ => Err(Error::invariant("a hidden state was not kept")),
        };
        let pad = join(&pad)?;
        for (index, pack) in self.packs.iter().enumerate() {
            let kept = (0..3).map(|slot| self.store.take((index, slot), &Device::Cpu)).collect::<Result<Vec<_>>>()?;
            let joined = join(&kept)?.rows;
            for (caption, (start, rows)) in pack.captions.clone().zip(pack.segments()) {
                let rows = joined.narrow(0, start, rows).map_err(failed("unpacking an embedding"))?;
                sink(caption, Embedding { rows }, &pad)?;
            }
        }
        Ok(())
    }
}

/// Takes the embeddings of a pass.
pub(super) type Sink<'s> = &'s mut dyn FnMut(usize, Embedding, &Embedding) -> Result<()>;

/// All embeddings that a pass hands to its sink.
pub(super) fn together(captions: usize, pass: impl FnOnce(Sink) -> Result<EncodeTimes>) -> Result<Encoded> {
    let (mut all, mut pad_row) = (Vec::with_capacity(captions), None);
    let mut collect = |_: usize, embedding: Embedding, pad: &Embedding| {
        all.push(embedding);
        pad_row.get_or_insert_with(|| pad.rows.clone());
        Ok(())
    };
    let times = pass(&mut collect)?;
    let rows = pad_row.ok_or_else(|| Error::invariant("a pass without captions"))?;
    Ok(Encoded { captions: all, pad: Embedding { rows }, times })
}

impl TextEncoder {
    /// Opens a text encoder: a checkpoint's folder or file, or a slab. Reads no weights yet (but a slab's scales).
    ///
    /// # Errors
    /// [`Error::Absent`] for missing files, [`Error::Data`] for files that are no Mistral text encoder.
    pub fn open<'m>(model: impl Into<TextModel<'m>>, device: Device, dtype: DType) -> Result<Self> {
        let weights = TextWeights::open(model.into())?;
        let geometry = weights.geometry().clone();
        Ok(Self { weights, geometry, device, dtype })
    }

    /// Its geometry.
    #[must_use]
    pub fn geometry(&self) -> &TextGeometry {
        &self.geometry
    }

    /// What it computes in.
    #[must_use]
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Runs `captions` through the encoder in one pass over the weights and gives their embeddings together, hidden states in memory.
    /// `progress` as for [`Self::encode_to`].
    ///
    /// # Errors
    /// As [`Self::encode_to`].
    pub fn encode(
        &self,
        captions: &[Tokens],
        pad_id: u32,
        states: [usize; 3],
        max_length: usize,
        keep: DType,
        progress: &mut dyn FnMut(u64, u64) -> Result<()>,
    ) -> Result<Encoded> {
        let task = Task { states, max_length, keep, hidden: Hidden::Memory };
        together(captions.len(), |sink| self.encode_to(captions, pad_id, &task, progress, sink))
    }

    /// Runs `captions` through the encoder in one pass over the weights. `progress` is called after every pack of every layer with
    /// (captions times layers done, total) and ends the pass by returning an error; `sink` gets each caption's index and embedding, in
    /// order, and the row of every pad.
    ///
    /// # Errors
    /// What `progress` and `sink` return; [`Error::Data`] for malformed or corrupt weights; [`Error::Config`] for states that a slab lacks layers
    /// for; failures of the device and of the file for hidden states.
    pub fn encode_to(
        &self,
        captions: &[Tokens],
        pad_id: u32,
        task: &Task,
        progress: &mut dyn FnMut(u64, u64) -> Result<()>,
        sink: &mut dyn FnMut(usize, Embedding, &Embedding) -> Result<()>,
    ) -> Result<EncodeTimes> {
        self.weights.check_states(&task.states)?;
        let depth = task.states.into_iter().max().unwrap_or(0);
        let store = match &task.hidden {
            Hidden::Memory => HiddenStore::memory(),
            Hidden::File(folder) => HiddenStore::file(folder)?,
        };
        let positions = self.positions(captions, task.max_length)?;
        let pad = self.weights.embed(&[pad_id], &self.device, self.dtype)?;
        let mut pass = Pass { encoder: self, task, packs: packs(captions, PACK_ROWS), positions, store, pad, pad_kept: [None, None, None] };
        pass.embed(captions)?;
        let mut times = EncodeTimes::default();
        for layer in 0..depth {
            // What is missing or misshapen is found before anything is computed.
            times.weight_bytes += self.weights.places(layer, Ty::F32)?.file_bytes();
        }
        std::thread::scope(|scope| {
            // Rendezvous: the reader holds one finished layer until it is taken, then reads the next.
            let (sender, receiver) = sync_channel(0);
            let reader = std::thread::Builder::new().name("layer reader".into());
            reader
                .spawn_scoped(scope, move || {
                    let mut files = DirectReader::new(DIRECT_FILE_BYTES_MIN);
                    for layer in 0..depth {
                        let started = Instant::now();
                        let read = self.weights.layer(layer, &mut files, &self.device, self.dtype).map(|w| (w, started.elapsed()));
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
                let started = Instant::now();
                let _span = tracing::trace_span!("encode layer", layer, captions = captions.len()).entered();
                pass.pad_layer(layer, &weights)?;
                for index in 0..pass.packs.len() {
                    let rows = pass.pack_layer(index, layer, &weights)?;
                    times.flops += 2.0 * self.geometry.layer_params() as f64 * rows as f64;
                    done += pass.packs.get(index).map_or(0, |p| p.captions.len()) as u64;
                    progress(done, total)?;
                }
                times.compute += started.elapsed();
            }
            Ok::<(), Error>(())
        })?;
        pass.finish(sink)?;
        Ok(times)
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

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::*;
    use std::path::Path;

    fn encoder() -> TextEncoder {
        let path = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/fixtures/goldens/model/text_encoder"));
        TextEncoder::open(path, Device::Cpu, DType::F32).unwrap()
    }

    fn bits(e: &Embedding) -> Vec<u32> {
        e.rows.flatten_all().unwrap().to_vec1::<f32>().unwrap().into_iter().map(f32::to_bits).collect()
    }

    /// Lengths that fill packs exactly, overflow them, and exceed one alone.
    fn captions(vocab: usize) -> Vec<Tokens> {
        let lengths = [1, 2, 3, 30, 127, 128, 129, 400, 90, 513, 511, 1024, 1, 1025, 64, 65];
        let id = |i: usize, j: usize| (((i * 7919 + j * 104_729) * 31) % vocab) as u32;
        lengths.iter().enumerate().map(|(i, n)| Tokens { ids: (0..*n).map(|j| id(i, j)).collect(), cut: 0 }).collect()
    }

    #[test]
    fn packed_equals_alone_bit_for_bit_in_memory_and_through_a_file() {
        let encoder = encoder();
        let (captions, states) = (captions(encoder.geometry.vocab), [0, 1, 3]);
        assert!(packs(&captions, PACK_ROWS).len() > 3 && packs(&captions, PACK_ROWS).iter().any(|p| p.captions.len() > 4));
        let one = |c: &[Tokens]| encoder.encode(c, 2, states, 1100, DType::F32, &mut |_, _| Ok(())).unwrap();
        let together = one(&captions);
        let folder = tempfile::tempdir().unwrap();
        let task = Task { states, max_length: 1100, keep: DType::F32, hidden: Hidden::File(folder.path().into()) };
        let mut spilled = Vec::new();
        let mut sink = |i: usize, e: Embedding, pad: &Embedding| {
            assert_eq!((i, bits(pad)), (spilled.len(), bits(&together.pad)));
            spilled.push(bits(&e));
            Ok(())
        };
        encoder.encode_to(&captions, 2, &task, &mut |_, _| Ok(()), &mut sink).unwrap();
        assert_eq!(spilled.len(), captions.len());
        for (i, caption) in captions.iter().enumerate() {
            let alone = one(std::slice::from_ref(caption));
            let alone_bits = alone.captions.first().map(bits).unwrap();
            assert!(alone_bits == bits(&together.captions[i]), "caption {i} of {} tokens", caption.ids.len());
            assert!(alone_bits == spilled[i], "caption {i} through a file");
            assert_eq!(bits(&alone.pad), bits(&together.pad));
        }
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
    }

    #[test]
    fn a_caption_does_not_see_its_neighbours_in_the_pack() {
        let encoder = encoder();
        let a = Tokens { ids: vec![5; 20], cut: 0 };
        let [b, c] = [7, 9].map(|id| Tokens { ids: vec![id; 33], cut: 0 });
        let one = |c: &[Tokens]| encoder.encode(c, 2, [1, 2, 3], 64, DType::F32, &mut |_, _| Ok(())).unwrap();
        let (x, y) = (one(&[a.clone(), b.clone()]), one(&[a, c]));
        assert_eq!(bits(&x.captions[0]), bits(&y.captions[0]));
        assert_ne!(bits(&x.captions[1]), bits(&y.captions[1]));
    }

    #[test]
    fn a_pass_ends_where_its_progress_says_so() {
        let encoder = encoder();
        let mut calls = 0;
        let mut stop = |_: u64, _: u64| {
            calls += 1;
            if calls == 2 { Err(Error::try_again("stop")) } else { Ok(()) }
        };
        let result = encoder.encode(&[Tokens { ids: vec![1, 2], cut: 0 }], 2, [1, 2, 3], 8, DType::F32, &mut stop);
        assert_eq!((result.err().unwrap().exit_code(), calls), (75, 2));
    }
}
