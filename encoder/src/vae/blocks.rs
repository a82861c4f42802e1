//! Encoder and decoder as lists of blocks: what [`super::network`] loads and walks, and what [`super::memory`] counts.
//!
//! A block is a convolution with what comes before it, a residual block, or the attention in the middle (`spec/flux2.md` 3). The lists are the
//! only place that knows the order and the names.

use std::ops::Range;

use super::config::VaeGeometry;

/// A convolution: kernel `taps` x `taps`. Stride 1 keeps the size (zeros around); stride 2 halves it (zeros on the right and at the bottom only);
/// `up` doubles the image before (each pixel repeated).
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct ConvSpec {
    pub name: String,
    pub input: usize,
    pub output: usize,
    pub taps: usize,
    pub stride: usize,
    pub up: bool,
}

/// Size of an activation: `batch` images of `height` x `width` pixels of `channels` values.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Shape {
    pub batch: usize,
    pub height: usize,
    pub width: usize,
    pub channels: usize,
}

impl Shape {
    /// Values of one pixel row of one image.
    pub fn row(&self) -> usize {
        self.width * self.channels
    }

    /// Values of everything.
    pub fn len(&self) -> usize {
        self.batch * self.height * self.row()
    }
}

impl ConvSpec {
    fn new(name: impl Into<String>, input: usize, output: usize, taps: usize) -> Self {
        Self { name: name.into(), input, output, taps, stride: 1, up: false }
    }

    /// Zeros above and to the left.
    pub fn padding(&self) -> usize {
        if self.taps == 3 && self.stride == 1 { 1 } else { 0 }
    }

    /// The size of what comes out.
    pub fn output(&self, x: Shape) -> Shape {
        let side = |n: usize| if self.up { 2 * n } else { n / self.stride };
        Shape { height: side(x.height), width: side(x.width), channels: self.output, ..x }
    }

    /// The rows of an input of `height` rows that rows `out` of the output need.
    pub fn window(&self, out: &Range<usize>, height: usize) -> Range<usize> {
        let (start, end) = (out.start * self.stride, (out.end.max(1) - 1) * self.stride + self.taps);
        let up = usize::from(self.up);
        let (start, end) = (start.saturating_sub(self.padding()), end.saturating_sub(self.padding()));
        start >> up..end.div_ceil(1 << up).min(height)
    }
}

/// A part of the network.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Block {
    /// `conv(x)`, or with the name of a norm `conv(silu(norm(x)))`.
    Conv { norm: Option<String>, conv: ConvSpec },
    /// `shortcut(x) + conv2(silu(norm2(conv1(silu(norm1(x))))))`; the shortcut is a 1 x 1 convolution where the channels change.
    Resnet { norms: [String; 2], convs: [ConvSpec; 2], shortcut: Option<ConvSpec> },
    /// `x + attention(norm(x))` over all pixels, one head of all channels.
    Attention { name: String, channels: usize },
}

impl Block {
    fn resnet(name: String, input: usize, output: usize) -> Self {
        Self::Resnet {
            norms: [format!("{name}.norm1"), format!("{name}.norm2")],
            convs: [ConvSpec::new(format!("{name}.conv1"), input, output, 3), ConvSpec::new(format!("{name}.conv2"), output, output, 3)],
            shortcut: (input != output).then(|| ConvSpec::new(format!("{name}.conv_shortcut"), input, output, 1)),
        }
    }

    fn conv(name: impl Into<String>, input: usize, output: usize, taps: usize) -> Self {
        Self::Conv { norm: None, conv: ConvSpec::new(name, input, output, taps) }
    }

    /// Whether it begins with a norm of its input.
    pub fn norms_input(&self) -> bool {
        !matches!(self, Self::Conv { norm: None, .. })
    }

    /// The size of what comes out.
    pub fn output(&self, x: Shape) -> Shape {
        match self {
            Self::Conv { conv, .. } => conv.output(x),
            Self::Resnet { convs: [_, last], .. } => last.output(x),
            Self::Attention { .. } => x,
        }
    }
}

fn middle(blocks: &mut Vec<Block>, g: &VaeGeometry, half: &str, channels: usize) {
    let name = format!("{half}.mid_block");
    blocks.push(Block::resnet(format!("{name}.resnets.0"), channels, channels));
    if g.mid_block_add_attention {
        blocks.push(Block::Attention { name: format!("{name}.attentions.0"), channels });
    }
    blocks.push(Block::resnet(format!("{name}.resnets.1"), channels, channels));
}

/// Image `[B, 3, H, W]` to the moments of the posterior `[B, 2 * latent_channels, H/8, W/8]`: means, then log variances.
pub(super) fn encoder(g: &VaeGeometry) -> Vec<Block> {
    let channels = &g.block_out_channels;
    let (first, last) = (channels.first().copied().unwrap_or_default(), channels.last().copied().unwrap_or_default());
    let (moments, mut input) = (2 * g.latent_channels, first);
    let mut blocks = vec![Block::conv("encoder.conv_in", 3, first, 3)];
    for (i, &output) in channels.iter().enumerate() {
        let name = format!("encoder.down_blocks.{i}");
        for j in 0..g.layers_per_block {
            blocks.push(Block::resnet(format!("{name}.resnets.{j}"), if j == 0 { input } else { output }, output));
        }
        if i + 1 < channels.len() {
            let conv = ConvSpec::new(format!("{name}.downsamplers.0.conv"), output, output, 3);
            blocks.push(Block::Conv { norm: None, conv: ConvSpec { stride: 2, ..conv } });
        }
        input = output;
    }
    middle(&mut blocks, g, "encoder", last);
    let conv = ConvSpec::new("encoder.conv_out", last, moments, 3);
    blocks.push(Block::Conv { norm: Some("encoder.conv_norm_out".into()), conv });
    if g.use_quant_conv {
        blocks.push(Block::conv("quant_conv", moments, moments, 1));
    }
    blocks
}

/// Latent `[B, latent_channels, h, w]` to image `[B, 3, 8h, 8w]`.
pub(super) fn decoder(g: &VaeGeometry) -> Vec<Block> {
    let channels = g.decoder_channels();
    let (first, last) = (channels.first().copied().unwrap_or_default(), channels.last().copied().unwrap_or_default());
    let (mut blocks, mut input) = (Vec::new(), last);
    if g.use_post_quant_conv {
        blocks.push(Block::conv("post_quant_conv", g.latent_channels, g.latent_channels, 1));
    }
    blocks.push(Block::conv("decoder.conv_in", g.latent_channels, last, 3));
    middle(&mut blocks, g, "decoder", last);
    for (i, &output) in channels.iter().rev().enumerate() {
        let name = format!("decoder.up_blocks.{i}");
        for j in 0..=g.layers_per_block {
            blocks.push(Block::resnet(format!("{name}.resnets.{j}"), if j == 0 { input } else { output }, output));
        }
        if i + 1 < channels.len() {
            let conv = ConvSpec::new(format!("{name}.upsamplers.0.conv"), output, output, 3);
            blocks.push(Block::Conv { norm: None, conv: ConvSpec { up: true, ..conv } });
        }
        input = output;
    }
    let conv = ConvSpec::new("decoder.conv_out", first, 3, 3);
    blocks.push(Block::Conv { norm: Some("decoder.conv_norm_out".into()), conv });
    blocks
}

/// Rows of an activation of `height` rows that are worked on at once where the network's largest has `full` rows and is cut into strips of
/// `tile` rows.
pub(super) fn strip_rows(tile: usize, full: usize, height: usize) -> usize {
    (tile * height / full.max(1)).clamp(1, height.max(1))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn windows_are_what_outputs_need() {
        let conv = ConvSpec::new("c", 1, 1, 3);
        assert_eq!((conv.window(&(0..4), 10), conv.window(&(4..10), 10)), (0..5, 3..10));
        let down = ConvSpec { stride: 2, ..conv.clone() };
        // The last row reads one row of zeros below the image.
        assert_eq!((down.window(&(0..2), 10), down.window(&(3..5), 10)), (0..5, 6..10));
        let up = ConvSpec { up: true, ..conv };
        assert_eq!((up.window(&(0..3), 5), up.window(&(3..4), 5), up.window(&(9..10), 5)), (0..2, 1..3, 4..5));
        assert_eq!(ConvSpec::new("c", 1, 1, 1).window(&(2..5), 9), 2..5);
    }
}
