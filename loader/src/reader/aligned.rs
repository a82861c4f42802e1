//! Memory for direct reads: starts on a 4096-byte boundary, as O_DIRECT asks on every disk we know.

use bytemuck::{Pod, Zeroable};

/// Alignment of buffers, offsets and lengths of direct reads.
pub const ALIGN: usize = 4096;

#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C, align(4096))]
struct Page([u8; ALIGN]);

/// A reusable aligned buffer.
#[derive(Default)]
pub struct AlignedBuffer {
    pages: Vec<Page>,
}

impl AlignedBuffer {
    /// Makes the buffer at least `bytes` long and returns it. Old content stays where it was.
    pub fn resize(&mut self, bytes: usize) -> &mut [u8] {
        let pages = bytes.div_ceil(ALIGN);
        if self.pages.len() < pages {
            self.pages.resize(pages, Page::zeroed());
        }
        &mut bytemuck::cast_slice_mut(&mut self.pages)[..pages * ALIGN]
    }

    /// All bytes.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        bytemuck::cast_slice(&self.pages)
    }
}
