//! XXH3-64, the checksum of everything that Serenity writes and compares: slab pages, payloads in the ring, manifests.
//!
//! It notices damage, not forgery. The vector unit is chosen at run time (AVX2 where the processor has it), the result is the same
//! everywhere.

use std::hash::Hasher;

use twox_hash::XxHash3_64;

/// XXH3-64 of `bytes`, seed 0.
#[must_use]
pub fn xxh3_64(bytes: &[u8]) -> u64 {
    XxHash3_64::oneshot(bytes)
}

/// XXH3-64 of `bytes` with a seed.
#[must_use]
pub fn xxh3_64_with_seed(bytes: &[u8], seed: u64) -> u64 {
    XxHash3_64::oneshot_with_seed(seed, bytes)
}

/// XXH3-64 of bytes that come piece by piece; how they are cut does not change it.
#[derive(Clone, Default)]
pub struct Xxh3(XxHash3_64);

impl Xxh3 {
    /// Of no bytes yet.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Takes in the bytes that follow.
    pub fn update(&mut self, bytes: &[u8]) {
        self.0.write(bytes);
    }

    /// Starts over with no bytes.
    pub fn reset(&mut self) {
        *self = Self::new();
    }

    /// The hash of all bytes so far.
    #[must_use]
    pub fn digest(&self) -> u64 {
        self.0.finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Against the reference implementation (xxHash 0.8.4 through python-xxhash 4.1.0) over bytes 0, 1, ..., 250, 0, 1, ....
    #[test]
    fn hashes_are_those_of_the_reference_implementation() {
        let bytes: Vec<u8> = (0..100_003u32).map(|i| (i % 251) as u8).collect();
        let expected = [
            (0, 0x2d06800538d394c2),
            (1, 0xc44bdff4074eecdb),
            (7, 0x0cd2084a62406b69),
            (16, 0x8355e3a6f61770db),
            (100, 0x004e4f921a64bd1c),
            (200, 0xf42a8864feaf0703),
            (240, 0x375a384d957fe865),
            (241, 0x02e8cd95421c6d02),
            (1000, 0x33ef703fb2b20ed1),
            (4096, 0x7135ffa504f1bc71),
            (100003, 0xacf33ba3cf61e369),
        ];
        for (length, hash) in expected {
            assert_eq!(xxh3_64(&bytes[..length]), hash, "{length} bytes");
            let mut pieces = Xxh3::new();
            bytes[..length].chunks(777).for_each(|piece| pieces.update(piece));
            assert_eq!(pieces.digest(), hash, "{length} bytes in pieces");
        }
        assert_eq!(xxh3_64_with_seed(&bytes[..1000], 42), 0x0f580bfa20541114);
    }
}
