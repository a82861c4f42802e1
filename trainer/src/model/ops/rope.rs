//! Rotary position embedding over four axes (t, h, w, l), interleaved pairs (`spec`: diffusers' `Flux2PosEmbed`).
//!
//! Axis `a` owns the next `axes[a]` features of a head; pair `j` of it turns by `id_a * theta^(-2j / axes[a])`. Frequencies and products
//! are float64, the table is float32. The rotation is orthogonal: backward turns the other way.

use candle_core::{Device, Result, Tensor};

/// Position ids of a token: t, h, w, l.
pub type Position = [f32; 4];

/// Cosines and sines `[T, head_dim / 2]`, float32, text tokens first.
#[derive(Debug)]
pub struct Rope {
    cos: Tensor,
    sin: Tensor,
    minus_sin: Tensor,
}

impl Rope {
    /// The table of the given positions.
    pub fn new(positions: &[Position], axes: &[usize], theta: f64, device: &Device) -> Result<Self> {
        let half = axes.iter().sum::<usize>() / 2;
        let mut cos = Vec::with_capacity(positions.len() * half);
        let mut sin = Vec::with_capacity(positions.len() * half);
        for position in positions {
            for (id, dim) in position.iter().zip(axes) {
                for j in 0..dim / 2 {
                    let angle = f64::from(*id) / theta.powf((2 * j) as f64 / *dim as f64);
                    cos.push(angle.cos() as f32);
                    sin.push(angle.sin() as f32);
                }
            }
        }
        let cos = Tensor::from_vec(cos, (positions.len(), half), device)?;
        let sin = Tensor::from_vec(sin, (positions.len(), half), device)?;
        Ok(Self { minus_sin: sin.neg()?, cos, sin })
    }

    /// Positions of `text` text tokens, then of a latent grid, row-major.
    #[must_use]
    pub fn positions(text: usize, height: usize, width: usize) -> Vec<Position> {
        let text = (0..text).map(|i| [0.0, 0.0, 0.0, i as f32]);
        let image = (0..height * width).map(|i| [0.0, (i / width) as f32, (i % width) as f32, 0.0]);
        text.chain(image).collect()
    }

    /// The rows of `tokens` tokens from `first` on, as a view.
    pub fn rows(&self, first: usize, tokens: usize) -> Result<Self> {
        let part = |t: &Tensor| t.narrow(0, first, tokens);
        Ok(Self { cos: part(&self.cos)?, sin: part(&self.sin)?, minus_sin: part(&self.minus_sin)? })
    }

    /// Tokens in the table.
    pub fn tokens(&self) -> Result<usize> {
        self.cos.dim(0)
    }

    /// `[T, d / 2]`, contiguous.
    pub fn cos(&self) -> &Tensor {
        &self.cos
    }

    /// `[T, d / 2]`, contiguous.
    pub fn sin(&self) -> &Tensor {
        &self.sin
    }

    /// `[T, d / 2]`, contiguous: the way back.
    pub fn minus_sin(&self) -> &Tensor {
        &self.minus_sin
    }

    /// Turns `x [B, H, T, d]` float32.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        candle_nn::rotary_emb::rope_i(x, &self.cos, &self.sin)
    }

    /// The gradient of `x` from that of the turned one.
    pub fn backward(&self, dy: &Tensor) -> Result<Tensor> {
        candle_nn::rotary_emb::rope_i(dy, &self.cos, &self.minus_sin)
    }
}

/// Turns the pairs of one head, in place.
pub fn turn(x: &mut [f32], cos: &[f32], sin: &[f32]) {
    for ((pair, cos), sin) in x.chunks_exact_mut(2).zip(cos).zip(sin) {
        if let [x0, x1] = pair {
            (*x0, *x1) = (*x0 * cos - *x1 * sin, *x1 * cos + *x0 * sin);
        }
    }
}
