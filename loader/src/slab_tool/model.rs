//! What a slab is made of: the transformer or the text encoder, as a list of linears and other tensors, and where their rows come from.

use std::path::{Path, PathBuf};

use serenity_protocol::geometry::{LinearSpec, TransformerGeometry};
use serenity_protocol::model_path::{SourcePlace, TransformerSource, resolve_path};
use serenity_protocol::slab::Slab;
use serenity_protocol::slab::manifest::Component;
use serenity_protocol::slab::text_encoder::{TextSlabShape, TextSource};
use serenity_protocol::{Error, Result};

/// The shape of what a slab holds.
#[derive(Debug, Clone, PartialEq)]
pub enum Model {
    /// The FLUX.2 transformer.
    Transformer(TransformerGeometry),
    /// The first layers of the text encoder.
    TextEncoder(TextSlabShape),
}

impl Model {
    /// What an opened slab says that it holds; `None` for slabs without our additions.
    #[must_use]
    pub fn of_slab(slab: &Slab) -> Option<Self> {
        let additions = slab.manifest().serenity.as_ref()?;
        let text = additions.text_encoder.clone().map(Model::TextEncoder);
        additions.geometry.clone().map(Model::Transformer).or(text)
    }

    /// Which component it is.
    #[must_use]
    pub fn component(&self) -> Component {
        match self {
            Model::Transformer(_) => Component::Transformer,
            Model::TextEncoder(_) => Component::TextEncoder,
        }
    }

    /// The linears of each block or layer in execution order, each group one run of the file; last, unless `blocks_only`, the transformer's
    /// linears outside the blocks.
    #[must_use]
    pub fn groups(&self, blocks_only: bool) -> Vec<Vec<LinearSpec>> {
        match self {
            Model::Transformer(geometry) => {
                let mut groups = self.blocks();
                if !blocks_only {
                    groups.push(geometry.other_linears());
                }
                groups
            }
            Model::TextEncoder(_) => self.blocks(),
        }
    }

    /// The linears of each block or layer.
    #[must_use]
    pub fn blocks(&self) -> Vec<Vec<LinearSpec>> {
        match self {
            Model::Transformer(geometry) => geometry.blocks().map(|b| geometry.block_linears(b)).collect(),
            Model::TextEncoder(shape) => (0..shape.layers).map(|layer| shape.linears(layer)).collect(),
        }
    }

    /// Every linear that the model's signature names.
    #[must_use]
    pub fn all_linears(&self) -> Vec<LinearSpec> {
        match self {
            Model::Transformer(geometry) => geometry.all_linears(),
            Model::TextEncoder(shape) => shape.all_linears(),
        }
    }

    /// Names and shapes of the tensors that go into the companion: every one that is no block linear.
    #[must_use]
    pub fn companion_tensors(&self) -> Vec<(String, Vec<usize>)> {
        match self {
            Model::Transformer(geometry) => {
                let linears = geometry.other_linears();
                let mut all: Vec<_> = linears.iter().map(|l| (format!("{}.weight", l.name), vec![l.out_features, l.in_features])).collect();
                for block in geometry.blocks() {
                    let prefix = geometry.block_prefix(block);
                    let norms = geometry.block_norms(block);
                    all.extend(norms.iter().map(|norm| (format!("{prefix}.{norm}.weight"), vec![geometry.attention_head_dim])));
                }
                all
            }
            Model::TextEncoder(shape) => shape.companion_tensors(),
        }
    }

    /// Names and shapes of everything that is read from the checkpoint.
    #[must_use]
    pub fn all_tensors(&self) -> Vec<(String, Vec<usize>)> {
        let linears = self.blocks().into_iter().flatten();
        let mut all: Vec<_> = linears.map(|l| (format!("{}.weight", l.name), vec![l.out_features, l.in_features])).collect();
        all.extend(self.companion_tensors());
        all
    }

    /// The default label of the architecture.
    #[must_use]
    pub fn architecture_id(&self) -> &'static str {
        let geometry = match self {
            Model::Transformer(geometry) => geometry,
            Model::TextEncoder(_) => return "mistral3_text_encoder",
        };
        match (geometry.inner_dim(), geometry.num_layers, geometry.num_single_layers) {
            (6144, 8, 48) => "flux2_dev",
            (4096, 8, 24) => "flux2_klein_9b",
            (3072, 5, 20) => "flux2_klein_4b",
            (d, ..) if d <= 1024 => "flux2_tiny",
            _ => "flux2",
        }
    }
}

/// The rows of a model.
pub enum Source {
    /// A transformer's checkpoint.
    Transformer(TransformerSource),
    /// A text encoder's checkpoint, and what is wanted of it.
    TextEncoder(TextSource, TextSlabShape),
}

impl Source {
    /// Opens a component of the model at `model` (folder, file or hub id in the local cache). `layers` counts for the text encoder only:
    /// by default those that the default embedding needs.
    ///
    /// # Errors
    /// [`Error::Absent`] where files are missing, [`Error::Data`] where they are not those of such a model.
    pub fn open(model: &str, component: Component, layers: Option<usize>) -> Result<Self> {
        match component {
            Component::Transformer if layers.is_some() => {
                Err(Error::config("--layers is for --component text_encoder: a transformer has all of its blocks in the slab"))
            }
            Component::Transformer => Ok(Source::Transformer(TransformerSource::open(&resolve_path(model)?)?)),
            Component::TextEncoder => {
                // A folder may have nothing but the text encoder.
                let inner = Some(Path::new(model).join("text_encoder")).filter(|p| p.is_dir());
                let path = match inner {
                    Some(inner) => inner,
                    None => resolve_path(model)?.text_encoder.ok_or_else(|| {
                        Error::absent("the model has no text encoder").at(model).advice("give a folder in the Hugging Face layout")
                    })?,
                };
                let source = TextSource::open(&path)?;
                let needed = source.geometry().hidden_states(None)?.into_iter().max().unwrap_or(0).max(1);
                let shape = TextSlabShape::new(source.geometry().clone(), layers.unwrap_or(needed))?;
                Ok(Source::TextEncoder(source, shape))
            }
        }
    }

    /// The shape of what is wanted of it.
    #[must_use]
    pub fn model(&self) -> Model {
        match self {
            Source::Transformer(source) => Model::Transformer(source.geometry().clone()),
            Source::TextEncoder(_, shape) => Model::TextEncoder(shape.clone()),
        }
    }

    /// Where a tensor lies.
    ///
    /// # Errors
    /// [`Error::Data`] if it is missing or of another shape.
    pub fn place(&self, name: &str, shape: &[usize]) -> Result<SourcePlace> {
        match self {
            Source::Transformer(source) => source.place(name, shape),
            Source::TextEncoder(source, _) => source.place(name, shape),
        }
    }

    /// The files that the content depends on.
    #[must_use]
    pub fn files(&self) -> Vec<PathBuf> {
        match self {
            Source::Transformer(source) => source.files(),
            Source::TextEncoder(source, _) => source.files(),
        }
    }
}
