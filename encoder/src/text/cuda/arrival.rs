//! What of a layer comes to the device, and what is made of it there.
//!
//! A checkpoint's tensors come to where products read them. Of a slab the layer's run of the file comes as it is, whole pages of it, whose hashes the
//! readers compare; its norms beside it. The compute stream dequantises the codes into a layer that the next one overwrites.

use std::sync::Arc;

use candle_core::DType;
use serenity_cuda::arena::ALIGNMENT;
use serenity_cuda::ops::rows::Int8Rows;
use serenity_cuda::{Gpu, Mat, Ptr, Ty};
use serenity_protocol::slab::Pages;
use serenity_protocol::{Error, Result};

use crate::text::stream::{Content, Part, Proof};
use crate::text::weights::{LayerPlaces, Stored, TextWeights};

/// A layer on its way.
pub(super) struct Arrival {
    /// What is read, with places in the memory that it comes to.
    pub parts: Vec<Part>,
    /// Bytes of that memory.
    pub bytes: usize,
    /// What is dequantised; nothing of a checkpoint.
    coded: Vec<Coded>,
    /// Where the norms come, if not to the layer itself.
    norms: Option<[usize; 2]>,
}

/// INT8 rows in the memory that a layer comes to, and where their values go.
struct Coded {
    codes: usize,
    scales: usize,
    padded: usize,
    rows: usize,
    columns: usize,
    to: usize,
}

impl Arrival {
    /// Of layer `index`, whose tensors are at `places`.
    ///
    /// # Errors
    /// [`Error::Data`] for a slab that a device cannot read.
    pub fn new(weights: &TextWeights, index: usize, places: &LayerPlaces) -> Result<Self> {
        match weights.slab() {
            None => Ok(Self { parts: places.float_parts()?, bytes: places.bytes, coded: Vec::new(), norms: None }),
            Some(slab) => {
                let unproven = || Error::data("the text encoder's slab has no page hashes").at(slab.slab().path()).advice("build it again");
                let pages = Arc::new(slab.slab().pages().cloned().ok_or_else(unproven)?);
                Self::coded(pages, &slab.layer_bytes(index)?, places)
            }
        }
    }

    fn coded(pages: Arc<Pages>, run: &std::ops::Range<u64>, places: &LayerPlaces) -> Result<Self> {
        let touched = pages.touched_by(run);
        let (start, end) = (pages.range(touched.start).start, pages.range(touched.end.saturating_sub(1)).end);
        let (mut parts, mut coded, mut norms) = (Vec::new(), Vec::new(), Vec::new());
        let mut bytes = ((end - start) as usize).next_multiple_of(ALIGNMENT);
        for part in &places.parts {
            match &part.place.stored {
                Stored::Rows(rows) => {
                    if parts.is_empty() {
                        parts.push(Part {
                            file: part.place.file.clone(),
                            start,
                            elements: (end - start) as usize,
                            content: Content::Bytes,
                            proof: Proof::Pages(pages.clone()),
                            to: 0,
                        });
                    }
                    if !rows.scales.start.is_multiple_of(4) {
                        return Err(Error::data("scales of the text encoder's slab lie where a device cannot read them")
                            .at(&part.place.file)
                            .offset(rows.scales.start)
                            .expected("a multiple of 4")
                            .advice("build the slab again"));
                    }
                    coded.push(Coded {
                        codes: (part.place.bytes.start - start) as usize,
                        scales: (rows.scales.start - start) as usize,
                        padded: rows.stored_columns,
                        rows: rows.rows,
                        columns: rows.columns,
                        to: part.to,
                    });
                }
                Stored::Floats { ty, xxh3 } => {
                    norms.push(bytes);
                    let proof = xxh3.map_or(Proof::None, Proof::Whole);
                    let (file, start) = (part.place.file.clone(), part.place.bytes.start);
                    parts.push(Part { file, start, elements: part.elements, content: Content::Floats(*ty), proof, to: bytes });
                    // Room for either type of the device.
                    bytes = (bytes + part.elements * DType::F32.size_in_bytes()).next_multiple_of(ALIGNMENT);
                }
            }
        }
        let two = || Error::invariant("a layer of a slab has not two norms");
        Ok(Self { parts, bytes, coded, norms: Some(norms.try_into().map_err(|_| two())?) })
    }

    /// Whether a layer is made of it that lies elsewhere.
    pub fn is_coded(&self) -> bool {
        !self.coded.is_empty()
    }

    /// Queues what makes the layer at `to` of what has come to `from`; where the layer is, and where its two norms are if not there.
    ///
    /// # Errors
    /// The driver's.
    pub fn unfold(&self, gpu: &Gpu, ty: Ty, from: Ptr, to: Ptr) -> Result<(Ptr, Option<[Ptr; 2]>)> {
        if !self.is_coded() {
            return Ok((from, None));
        }
        for c in &self.coded {
            let rows = Int8Rows { codes: from.offset(c.codes), scales: from.offset(c.scales), rows: c.rows, padded: c.padded };
            gpu.dequant_rows(Mat::new(to.offset(c.to), ty, c.rows, c.columns), rows)?;
        }
        Ok((to, self.norms.map(|norms| norms.map(|at| from.offset(at)))))
    }
}
