//! Where every byte of a safetensors file will lie, before the first one is written.
//!
//! [`FilePlan`] is any file of named tensors; [`SlabPlan`] is ours: a block's codes one after the other in the order in which the loader
//! needs them, then its scales and zero points, every block starting on a 4 KiB boundary, so that one sequential direct read fetches
//! a block. The safetensors format forbids holes, so gaps are tensors themselves: U8, named `__pad__.N`, zero. The original reader
//! looks tensors up by name and never sees them.

use safetensors::Dtype;
use serenity_protocol::geometry::{LinearSpec, TransformerGeometry};
use serenity_protocol::slab::manifest::ManifestLayer;
use serenity_protocol::{Error, Result};

use super::model::Model;

/// Alignment of the payload, of every block and of the file's length: the unit of direct reads.
pub const BLOCK_ALIGN: u64 = 4096;
/// Alignment of the float tensors within a block.
const FLOAT_ALIGN: u64 = 64;
/// Name prefix of the tensors that fill gaps.
pub const PAD_PREFIX: &str = "__pad__.";

/// One tensor to be written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PlannedTensor {
    /// Key in the header.
    pub name: String,
    /// Element type.
    pub dtype: Dtype,
    /// Shape.
    pub shape: Vec<usize>,
    /// Absolute offset in the file.
    pub offset: u64,
    /// Length.
    pub bytes: u64,
}

impl PlannedTensor {
    /// Whether it only fills a gap.
    #[must_use]
    pub fn is_pad(&self) -> bool {
        self.name.starts_with(PAD_PREFIX)
    }
}

/// A safetensors file to be written: its header and its tensors in file order, without gaps.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FilePlan {
    /// Length prefix and header.
    pub header: Vec<u8>,
    /// The tensors in file order.
    pub tensors: Vec<PlannedTensor>,
    /// Length of the file.
    pub file_bytes: u64,
}

/// Collects tensors in file order.
#[derive(Default)]
pub struct PlanBuilder {
    tensors: Vec<PlannedTensor>,
    end: u64,
    pads: usize,
}

impl PlanBuilder {
    /// Adds a tensor.
    ///
    /// # Errors
    /// [`Error::Data`] if its size overflows or is no whole number of bytes.
    pub fn push(&mut self, name: String, dtype: Dtype, shape: Vec<usize>) -> Result<()> {
        let bits = shape.iter().try_fold(dtype.bitsize() as u64, |n, &d| n.checked_mul(d as u64));
        let end = bits.filter(|b| b % 8 == 0).and_then(|b| self.end.checked_add(b / 8));
        let (Some(bits), Some(end)) = (bits, end) else {
            return Err(Error::data(format!("the size of tensor '{name}' overflows")).found(format!("{shape:?}")));
        };
        self.tensors.push(PlannedTensor { name, dtype, shape, offset: self.end, bytes: bits / 8 });
        self.end = end;
        Ok(())
    }

    /// Fills up to a multiple of `align`.
    ///
    /// # Errors
    /// As [`Self::push`].
    pub fn align(&mut self, align: u64) -> Result<()> {
        let gap = self.end.next_multiple_of(align) - self.end;
        if gap > 0 {
            let name = format!("{PAD_PREFIX}{}", self.pads);
            self.pads += 1;
            self.push(name, Dtype::U8, vec![gap as usize])?;
        }
        Ok(())
    }

    /// Writes the header, padded with spaces so that the payload starts at a multiple of `align` (at least 8).
    ///
    /// # Errors
    /// [`Error::Invariant`] if the header cannot be written as JSON.
    pub fn finish(self, align: u64, metadata: &[(&str, &str)]) -> Result<FilePlan> {
        let mut map = serde_json::Map::new();
        if !metadata.is_empty() {
            let pairs: serde_json::Map<_, _> = metadata.iter().map(|(k, v)| ((*k).to_owned(), (*v).into())).collect();
            map.insert("__metadata__".into(), pairs.into());
        }
        for tensor in &self.tensors {
            let dtype = serde_json::to_value(tensor.dtype).map_err(|e| Error::invariant("a tensor type has no name").cause(e))?;
            let offsets = [tensor.offset, tensor.offset + tensor.bytes];
            let entry = serde_json::json!({"dtype": dtype, "shape": tensor.shape, "data_offsets": offsets});
            if map.insert(tensor.name.clone(), entry).is_some() {
                return Err(Error::invariant(format!("tensor '{}' was planned twice", tensor.name)));
            }
        }
        let mut text = serde_json::to_vec(&map).map_err(|e| Error::invariant("a header cannot be written as JSON").cause(e))?;
        let data_start = (8 + text.len() as u64).next_multiple_of(align.max(8));
        text.resize(data_start as usize - 8, b' ');
        let mut header = (text.len() as u64).to_le_bytes().to_vec();
        header.extend_from_slice(&text);
        let mut tensors = self.tensors;
        for tensor in &mut tensors {
            tensor.offset += data_start;
        }
        Ok(FilePlan { header, tensors, file_bytes: data_start + self.end })
    }
}

/// What a tensor of the slab holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Content {
    /// The codes of the linear with this index in [`SlabPlan::linears`].
    Codes(usize),
    /// Its scales.
    Scales(usize),
    /// Its zero points.
    ZeroPoints(usize),
    /// Zeros.
    Pad,
}

/// The slab file: plan, and what each tensor holds.
#[derive(Debug, Clone)]
pub struct SlabPlan {
    /// The file.
    pub file: FilePlan,
    /// The linears in file order, with their manifest entries.
    pub linears: Vec<(LinearSpec, ManifestLayer)>,
    /// One for each of the file's tensors.
    pub contents: Vec<Content>,
    /// Indices into the file's tensors where a block (or the part behind the blocks) begins: the points at which a build can be taken up again.
    pub block_starts: Vec<usize>,
}

impl SlabPlan {
    /// Plans the slab of a model: its blocks in execution order, then, unless `blocks_only`, the other linears.
    ///
    /// # Errors
    /// [`Error::Config`] for an impossible `pack_k`, [`Error::Data`] for an impossible size.
    pub fn new(geometry: &TransformerGeometry, pack_k: usize, blocks_only: bool) -> Result<Self> {
        Self::of(&Model::Transformer(geometry.clone()), pack_k, blocks_only)
    }

    /// The same of any component.
    ///
    /// # Errors
    /// As [`Self::new`].
    pub fn of(model: &Model, pack_k: usize, blocks_only: bool) -> Result<Self> {
        let mut this = Builder::default();
        for linears in model.groups(blocks_only) {
            this.group(linears, pack_k)?;
        }
        this.file.align(BLOCK_ALIGN)?;
        this.sync_contents();
        let file = this.file.finish(BLOCK_ALIGN, &[])?;
        Ok(Self { file, linears: this.linears, contents: this.contents, block_starts: this.block_starts })
    }
}

#[derive(Default)]
struct Builder {
    file: PlanBuilder,
    linears: Vec<(LinearSpec, ManifestLayer)>,
    contents: Vec<Content>,
    block_starts: Vec<usize>,
}

impl Builder {
    /// Codes of all linears, then scales of all, then zero points of all.
    fn group(&mut self, linears: Vec<LinearSpec>, pack_k: usize) -> Result<()> {
        self.file.align(BLOCK_ALIGN)?;
        self.sync_contents();
        self.block_starts.push(self.contents.len());
        let first = self.linears.len();
        for linear in linears {
            let layer = ManifestLayer::new(&linear, pack_k)?;
            self.file.push(layer.qweight_key.clone(), Dtype::I8, layer.packed_shape.to_vec())?;
            self.contents.push(Content::Codes(self.linears.len()));
            self.linears.push((linear, layer));
        }
        self.file.align(FLOAT_ALIGN)?;
        self.sync_contents();
        let group = first..self.linears.len();
        for (index, (linear, layer)) in self.linears.iter().enumerate().skip(first) {
            self.file.push(layer.scale_key.clone(), Dtype::F32, vec![linear.out_features])?;
            self.contents.push(Content::Scales(index));
        }
        for index in group {
            if let Some((linear, layer)) = self.linears.get(index) {
                self.file.push(layer.zero_point_key.clone(), Dtype::F32, vec![linear.out_features])?;
                self.contents.push(Content::ZeroPoints(index));
            }
        }
        Ok(())
    }

    /// Every tensor that `align` added is a pad.
    fn sync_contents(&mut self) {
        self.contents.resize(self.file.tensors.len(), Content::Pad);
    }
}
