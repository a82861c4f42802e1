//! All device memory of a run: one allocation, handed out as a stack.
//!
//! The driver's figure does not move after start, allocation costs nothing, and addresses are the same in every step. Long-lived parts are
//! reserved first; a block visit takes a [`Mark`], reserves what it needs, and resets to the mark. Memory that is reset may still be in use
//! by queued work: work queued later on the same stream is ordered behind it, other streams wait for an event.
//!
//! Every reservation starts at a multiple of [`ALIGNMENT`], so that all kernels may use 16-byte accesses on whole matrices.
#![forbid(unsafe_code)]

use std::cell::Cell;

use serenity_protocol::{Error, Result};

use crate::driver::{DeviceBuffer, Ptr};
use crate::gpu::Gpu;
use crate::mat::{Mat, Ty};

/// Bytes that every reservation is aligned to.
pub const ALIGNMENT: usize = 256;

/// A height of the stack to come back to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Mark(usize);

/// The arithmetic of the stack, without memory.
#[derive(Debug)]
struct Stack {
    capacity: usize,
    used: Cell<usize>,
    high: Cell<usize>,
}

impl Stack {
    fn new(capacity: usize) -> Self {
        Self { capacity, used: Cell::new(0), high: Cell::new(0) }
    }

    /// The offset of `bytes` new bytes.
    fn reserve(&self, bytes: usize) -> Result<usize> {
        let start = self.used.get();
        let end = bytes.checked_next_multiple_of(ALIGNMENT).and_then(|b| start.checked_add(b));
        match end {
            Some(end) if end <= self.capacity => {
                self.used.set(end);
                self.high.set(self.high.get().max(end));
                Ok(start)
            }
            _ => Err(Error::try_again("the device memory set aside for training is used up")
                .expected(format!("{bytes} bytes"))
                .found(format!("{} of {} bytes are left", self.capacity - start, self.capacity))
                .advice(match end {
                    Some(end) => format!(
                        "{} MiB more are needed: raise memory.stagehand.vram_high_watermark_mb",
                        (end - self.capacity).div_ceil(1 << 20)
                    ),
                    None => "lower the resolution".to_string(),
                })),
        }
    }

    fn reset(&self, mark: Mark) -> Result<()> {
        if mark.0 > self.used.get() {
            return Err(Error::invariant("device memory is reset to a mark above what is in use"));
        }
        self.used.set(mark.0);
        Ok(())
    }
}

/// One allocation of device memory as a stack.
#[derive(Debug)]
pub struct Arena {
    memory: DeviceBuffer,
    stack: Stack,
}

impl Arena {
    /// Takes `bytes` from the device.
    ///
    /// # Errors
    /// [`Error::TryAgain`] if the device has not that much free.
    pub fn new(gpu: &Gpu, bytes: usize) -> Result<Self> {
        Ok(Self { memory: DeviceBuffer::new(gpu.context(), bytes)?, stack: Stack::new(bytes) })
    }

    /// `bytes` bytes with undefined content.
    ///
    /// # Errors
    /// [`Error::TryAgain`] if they do not fit, with how much is missing.
    pub fn reserve(&self, bytes: usize) -> Result<Ptr> {
        self.stack.reserve(bytes).map(|offset| self.memory.ptr().offset(offset))
    }

    /// A dense matrix with undefined content.
    ///
    /// # Errors
    /// [`Error::TryAgain`] if it does not fit.
    pub fn mat(&self, ty: Ty, rows: usize, cols: usize) -> Result<Mat> {
        let bytes = rows
            .checked_mul(cols)
            .and_then(|n| n.checked_mul(ty.bytes()))
            .ok_or_else(|| Error::invariant("a matrix is too large to count"))?;
        Ok(Mat::new(self.reserve(bytes)?, ty, rows, cols))
    }

    /// The present height.
    #[must_use]
    pub fn mark(&self) -> Mark {
        Mark(self.stack.used.get())
    }

    /// Gives back everything reserved since `mark`.
    ///
    /// # Errors
    /// [`Error::Invariant`] if less is in use than at the mark: a mark of a scope that ended before.
    pub fn reset(&self, mark: Mark) -> Result<()> {
        self.stack.reset(mark)
    }

    /// Bytes reserved now.
    #[must_use]
    pub fn used(&self) -> usize {
        self.stack.used.get()
    }

    /// The most that was ever reserved.
    #[must_use]
    pub fn high_water(&self) -> usize {
        self.stack.high.get()
    }

    /// Its whole size.
    #[must_use]
    pub fn capacity(&self) -> usize {
        self.stack.capacity
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn reports_what_is_missing() {
        let stack = Stack::new(4 << 20);
        stack.reserve(3 << 20).unwrap();
        let error = stack.reserve(3 << 20).unwrap_err();
        assert_eq!(error.exit_code(), 75);
        assert!(error.to_string().contains("2 MiB more"), "{error}");
        assert_eq!(stack.used.get(), 3 << 20, "a refused reservation changes nothing");
        assert!(stack.reserve(usize::MAX).is_err());
        assert!(stack.reserve(1 << 20).is_ok());
    }

    #[test]
    fn a_mark_of_an_ended_scope_is_refused() {
        let stack = Stack::new(1 << 20);
        let low = Mark(stack.used.get());
        stack.reserve(1000).unwrap();
        let high = Mark(stack.used.get());
        stack.reset(low).unwrap();
        assert_eq!(stack.reset(high).unwrap_err().exit_code(), 70);
        stack.reset(low).unwrap();
        assert_eq!((stack.used.get(), stack.high.get()), (0, 1024));
    }

    proptest! {
        #[test]
        fn reservations_are_aligned_disjoint_and_within(sizes in proptest::collection::vec(0usize..5000, 0..40)) {
            let stack = Stack::new(100_000);
            let mut end = 0;
            for bytes in sizes {
                let Ok(start) = stack.reserve(bytes) else {
                    prop_assert!(stack.used.get() + bytes.next_multiple_of(ALIGNMENT) > 100_000);
                    continue;
                };
                prop_assert!(start >= end && start % ALIGNMENT == 0);
                end = start + bytes;
                prop_assert!(end <= 100_000 && stack.used.get() >= end && stack.high.get() == stack.used.get());
            }
        }
    }
}
