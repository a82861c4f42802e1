//! The walk through a half of the VAE, the same on every device, whole or in strips.
//!
//! **Strips change nothing but rounding.** The halo of a convolution is exact because a strip of its output is made from all the rows that it
//! needs; a group norm is exact because its sums are gathered over all strips of an activation before any strip of the next one is made; the
//! attention sees all keys and values. So an activation goes through one layer at a time: whole on the device, or strip by strip with the rest
//! in host memory. (Overlapping tiles that go through the whole network and are blended have other norms and another attention.)
//!
//! What a device has to do is a [`Kit`]. Invariant: all strips of a layer are finished before a strip of the next one is begun.

use std::ops::Range;

use serenity_protocol::{Error, Result};

use super::blocks::{Block, ConvSpec, Shape, strip_rows};
use super::names::VaeWeights;

/// What a device does for the VAE. Rows are consecutive pixel rows of every image of a batch, on the device, and know their place.
pub(super) trait Kit {
    /// A loaded convolution.
    type Conv;
    /// A loaded group norm.
    type Norm;
    /// A loaded attention with its norm.
    type Attention;
    /// Pixel rows on the device.
    type Rows;
    /// A whole activation in host memory.
    type Host;
    /// Sums for the group norms of a whole activation.
    type Sums;
    /// Keys and values of all pixels.
    type Keys;

    fn load_conv(&self, w: &VaeWeights, spec: &ConvSpec) -> Result<Self::Conv>;
    fn load_norm(&self, w: &VaeWeights, name: &str, channels: usize) -> Result<Self::Norm>;
    fn load_attention(&self, w: &VaeWeights, name: &str, channels: usize) -> Result<Self::Attention>;

    /// Host memory for an activation.
    fn blank(&self, shape: Shape) -> Result<Self::Host>;
    /// Rows from host memory.
    fn read(&self, host: &Self::Host, shape: Shape, rows: Range<usize>) -> Result<Self::Rows>;
    /// Rows to host memory.
    fn write(&self, host: &mut Self::Host, shape: Shape, rows: &Self::Rows) -> Result<()>;

    /// Sums, of nothing yet.
    fn sums(&self, shape: Shape) -> Result<Self::Sums>;
    /// Rows `out` of the convolution of `x`, which holds the window that they need; with a norm, of `silu(norm(x))`; added to `onto`, the same
    /// rows of something else. Not to be read before [`Self::finish`].
    fn conv(
        &self,
        conv: &Self::Conv,
        x: &Self::Rows,
        norm: Option<(&Self::Norm, &Self::Sums)>,
        out: Range<usize>,
        onto: Option<Self::Rows>,
    ) -> Result<Self::Rows>;
    /// Adds what a convolution left to do, and notes the sums.
    fn finish(&self, rows: Self::Rows, sums: Option<&mut Self::Sums>) -> Result<Self::Rows>;

    /// Place for keys and values.
    fn keys(&self, shape: Shape) -> Result<Self::Keys>;
    /// Keys and values of `x`.
    fn add_keys(&self, attention: &Self::Attention, x: &Self::Rows, sums: &Self::Sums, keys: &mut Self::Keys) -> Result<()>;
    /// `x + attention(norm(x))`; to be finished.
    fn attend(&self, attention: &Self::Attention, x: Self::Rows, sums: &Self::Sums, keys: &Self::Keys) -> Result<Self::Rows>;
}

/// Where an activation is.
pub(super) enum Kept<K: Kit> {
    /// Whole on the device.
    Device(K::Rows),
    /// In host memory.
    Host(K::Host),
}

/// Output of a layer.
struct Activation<K: Kit> {
    kept: Kept<K>,
    shape: Shape,
    sums: Option<K::Sums>,
}

struct Conv<K: Kit> {
    spec: ConvSpec,
    loaded: K::Conv,
}

enum Loaded<K: Kit> {
    Conv { norm: Option<K::Norm>, conv: Conv<K> },
    Resnet { norms: [K::Norm; 2], convs: Box<[Conv<K>; 2]>, shortcut: Option<Box<Conv<K>>> },
    Attention(K::Attention),
}

/// What the output of a convolution is added to.
enum Onto<'a, K: Kit> {
    Nothing,
    /// This, in its place.
    Sum(Activation<K>),
    /// A convolution of this.
    Shortcut(&'a Activation<K>, &'a Conv<K>),
}

/// A half of the VAE on a device.
pub(super) struct Network<K: Kit> {
    blocks: Vec<Loaded<K>>,
    /// Whether the block's output is normalised by the next.
    observed: Vec<bool>,
    /// What was loaded.
    specs: Vec<Block>,
}

impl<K: Kit> Network<K> {
    /// Loads all blocks.
    pub fn load(kit: &K, w: &VaeWeights, specs: Vec<Block>) -> Result<Self> {
        let conv = |spec: &ConvSpec| Ok(Conv { spec: spec.clone(), loaded: kit.load_conv(w, spec)? });
        let load = |spec: &Block| -> Result<Loaded<K>> {
            Ok(match spec {
                Block::Conv { norm, conv: c } => {
                    let norm = norm.as_ref().map(|name| kit.load_norm(w, name, c.input)).transpose()?;
                    Loaded::Conv { norm, conv: conv(c)? }
                }
                Block::Resnet { norms: [n1, n2], convs: [c1, c2], shortcut } => Loaded::Resnet {
                    norms: [kit.load_norm(w, n1, c1.input)?, kit.load_norm(w, n2, c2.input)?],
                    convs: Box::new([conv(c1)?, conv(c2)?]),
                    shortcut: shortcut.as_ref().map(|s| conv(s).map(Box::new)).transpose()?,
                },
                Block::Attention { name, channels } => Loaded::Attention(kit.load_attention(w, name, *channels)?),
            })
        };
        let blocks = specs.iter().map(load).collect::<Result<Vec<_>>>()?;
        let observed = (1..=specs.len()).map(|next| specs.get(next).is_some_and(Block::norms_input)).collect();
        Ok(Self { blocks, observed, specs })
    }

    /// Its blocks.
    pub fn specs(&self) -> &[Block] {
        &self.specs
    }

    /// The output for `input` of `shape`, whole where `tile` is `None`, else in strips of `tile` rows of the largest activation.
    pub fn forward(&self, kit: &K, input: Kept<K>, shape: Shape, tile: Option<usize>) -> Result<(K::Host, Shape)> {
        let output = self.specs.iter().fold(shape, |shape, block| block.output(shape));
        let walk = Walk { kit, tile, full: shape.height.max(output.height) };
        let kept = match input {
            Kept::Host(host) if tile.is_none() => Kept::Device(kit.read(&host, shape, 0..shape.height)?),
            Kept::Device(_) if tile.is_some() => return Err(mixed()),
            other => other,
        };
        let mut x = Activation { kept, shape, sums: None };
        for (block, &observe) in self.blocks.iter().zip(&self.observed) {
            x = walk.block(x, block, observe)?;
        }
        match x.kept {
            Kept::Host(host) => Ok((host, x.shape)),
            Kept::Device(rows) => {
                let mut host = kit.blank(x.shape)?;
                kit.write(&mut host, x.shape, &rows)?;
                Ok((host, x.shape))
            }
        }
    }
}

struct Walk<'k, K: Kit> {
    kit: &'k K,
    tile: Option<usize>,
    /// Rows of the largest activation.
    full: usize,
}

fn mixed() -> Error {
    Error::invariant("activations of one image are partly on the device and partly on the host")
}

impl<K: Kit> Walk<'_, K> {
    fn block(&self, x: Activation<K>, block: &Loaded<K>, observe: bool) -> Result<Activation<K>> {
        match block {
            Loaded::Conv { norm, conv } => self.layer(&x, conv, norm.as_ref(), Onto::Nothing, observe),
            Loaded::Resnet { norms: [n1, n2], convs, shortcut } => {
                let [c1, c2] = convs.as_ref();
                let inner = self.layer(&x, c1, Some(n1), Onto::Nothing, true)?;
                match shortcut {
                    None => self.layer(&inner, c2, Some(n2), Onto::Sum(x), observe),
                    Some(shortcut) => self.layer(&inner, c2, Some(n2), Onto::Shortcut(&x, shortcut), observe),
                }
            }
            Loaded::Attention(attention) => self.attention(x, attention, observe),
        }
    }

    fn strips(&self, height: usize) -> impl Iterator<Item = Range<usize>> {
        let rows = self.tile.map_or(height, |tile| strip_rows(tile, self.full, height)).max(1);
        (0..height).step_by(rows).map(move |start| start..(start + rows).min(height))
    }

    /// One convolution over a whole activation.
    fn layer(&self, x: &Activation<K>, conv: &Conv<K>, norm: Option<&K::Norm>, onto: Onto<'_, K>, observe: bool) -> Result<Activation<K>> {
        let (kit, shape) = (self.kit, conv.spec.output(x.shape));
        let mut sums = observe.then(|| kit.sums(shape)).transpose()?;
        let unseen = || Error::invariant("a norm has no sums of its input");
        let norm = norm.map(|n| x.sums.as_ref().map(|s| (n, s)).ok_or_else(unseen)).transpose()?;
        let kept = match &x.kept {
            Kept::Device(rows) => {
                let all = || 0..shape.height;
                let base = match onto {
                    Onto::Nothing => None,
                    Onto::Sum(Activation { kept: Kept::Device(base), .. }) => Some(base),
                    Onto::Shortcut(Activation { kept: Kept::Device(base), .. }, conv) => {
                        Some(kit.conv(&conv.loaded, base, None, all(), None)?)
                    }
                    _ => return Err(mixed()),
                };
                Kept::Device(kit.finish(kit.conv(&conv.loaded, rows, norm, all(), base)?, sums.as_mut())?)
            }
            Kept::Host(host) => Kept::Host(self.in_strips(host, x.shape, shape, conv, norm, onto, sums.as_mut())?),
        };
        Ok(Activation { kept, shape, sums })
    }

    #[allow(clippy::too_many_arguments)] // the second half of `layer`
    fn in_strips(
        &self,
        host: &K::Host,
        input: Shape,
        shape: Shape,
        conv: &Conv<K>,
        norm: Option<(&K::Norm, &K::Sums)>,
        onto: Onto<'_, K>,
        mut sums: Option<&mut K::Sums>,
    ) -> Result<K::Host> {
        let kit = self.kit;
        let (mut target, add, shortcut) = match onto {
            Onto::Nothing => (kit.blank(shape)?, false, None),
            Onto::Sum(Activation { kept: Kept::Host(base), .. }) => (base, true, None),
            Onto::Shortcut(Activation { kept: Kept::Host(base), shape: from, .. }, conv) => {
                (kit.blank(shape)?, false, Some((base, *from, conv)))
            }
            _ => return Err(mixed()),
        };
        for out in self.strips(shape.height) {
            let mut base = if add { Some(kit.read(&target, shape, out.clone())?) } else { None };
            if let Some((from, from_shape, conv)) = shortcut {
                let part = kit.read(from, from_shape, out.clone())?;
                base = Some(kit.conv(&conv.loaded, &part, None, out.clone(), None)?);
            }
            let part = kit.read(host, input, conv.spec.window(&out, input.height))?;
            let rows = kit.finish(kit.conv(&conv.loaded, &part, norm, out, base)?, sums.as_deref_mut())?;
            kit.write(&mut target, shape, &rows)?;
        }
        Ok(target)
    }

    fn attention(&self, x: Activation<K>, attention: &K::Attention, observe: bool) -> Result<Activation<K>> {
        let (kit, shape) = (self.kit, x.shape);
        let seen = x.sums.as_ref().ok_or_else(|| Error::invariant("an attention has no sums of its input"))?;
        let mut sums = observe.then(|| kit.sums(shape)).transpose()?;
        let mut keys = kit.keys(shape)?;
        let kept = match x.kept {
            Kept::Device(rows) => {
                kit.add_keys(attention, &rows, seen, &mut keys)?;
                Kept::Device(kit.finish(kit.attend(attention, rows, seen, &keys)?, sums.as_mut())?)
            }
            Kept::Host(mut host) => {
                for rows in self.strips(shape.height) {
                    kit.add_keys(attention, &kit.read(&host, shape, rows)?, seen, &mut keys)?;
                }
                for rows in self.strips(shape.height) {
                    let rows = kit.attend(attention, kit.read(&host, shape, rows)?, seen, &keys)?;
                    kit.write(&mut host, shape, &kit.finish(rows, sums.as_mut())?)?;
                }
                Kept::Host(host)
            }
        };
        Ok(Activation { kept, shape, sums })
    }
}
