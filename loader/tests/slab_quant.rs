//! Properties of the quantiser and of the dequantiser.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use half::bf16;
use proptest::prelude::*;
use serenity_protocol::slab::quant::{SCALE_MIN, all_finite, dequantize, quantize_row};

/// Finite values of all magnitudes that a row can hold together with values near its largest.
fn row() -> impl Strategy<Value = Vec<f32>> {
    let value = prop_oneof![
        -1f32..1f32,
        (-1f32..1f32).prop_map(|v| v * 1e-6),
        any::<f32>().prop_filter("finite", |v| v.is_finite()),
        Just(0.0),
        Just(-0.0),
    ];
    (prop::collection::vec(value, 1..200), -30i32..30).prop_map(|(v, e)| {
        let factor = 2f32.powi(e);
        v.into_iter().map(|x| if (x * factor).is_finite() { x * factor } else { x }).collect()
    })
}

proptest! {
    #[test]
    fn error_of_a_row_is_half_a_scale(row in row(), padding in 0usize..70) {
        let mut codes = vec![77i8; row.len() + padding];
        let scale = quantize_row(&row, &mut codes);
        prop_assert!(scale >= SCALE_MIN && scale.is_finite());
        for (i, code) in codes.iter().enumerate() {
            prop_assert_ne!(*code, i8::MIN);
            match row.get(i) {
                None => prop_assert_eq!(*code, 0),
                Some(&w) => {
                    let back = f64::from(*code) * f64::from(scale);
                    // The reciprocal and the product are rounded to float32: a few units in the last place of a code of up to 127.
                    let limit = f64::from(scale) * (0.5 + 127.0 * 4.0 * f64::from(f32::EPSILON)) + 1e-6;
                    prop_assert!((back - f64::from(w)).abs() <= limit, "{w} became {back}, scale {scale}");
                }
            }
        }
    }

    /// The definition, one operation after the other.
    #[test]
    fn codes_follow_the_definition(row in row()) {
        let mut codes = vec![0i8; row.len()];
        let scale = quantize_row(&row, &mut codes);
        let amax = row.iter().fold(0f32, |m, v| m.max(v.abs()));
        prop_assert_eq!(scale.to_bits(), (amax / 127.0).max(1e-8).to_bits());
        let inverse = 1.0 / scale;
        for (w, code) in row.iter().zip(codes) {
            prop_assert_eq!(code, (w * inverse).round_ties_even().clamp(-127.0, 127.0) as i8);
        }
    }

    /// Rounded as `half` rounds, whatever the scale.
    #[test]
    fn dequantised_values_are_rounded_products(codes in prop::collection::vec(any::<i8>(), 0..100), bits in any::<u32>()) {
        let scale = f32::from_bits(bits);
        let mut values = vec![bf16::ONE; codes.len()];
        dequantize(&codes, scale, &mut values);
        for (code, value) in codes.iter().zip(values) {
            let expected = bf16::from_f32(f32::from(*code) * scale);
            prop_assert!(value.to_bits() == expected.to_bits() || (value.is_nan() && expected.is_nan()), "{code} * {scale}: {value} {expected}");
        }
    }
}

#[test]
fn zero_rows_and_halves() {
    let mut codes = [1i8; 4];
    assert_eq!(quantize_row(&[0.0, -0.0, 0.0], &mut codes), 1e-8);
    assert_eq!(codes, [0; 4]);
    // Scale 1: halves go to the even neighbour.
    let mut codes = [0i8; 8];
    let scale = quantize_row(&[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -127.0, 126.5], &mut codes);
    assert_eq!(scale, 1.0);
    assert_eq!(codes, [127, 0, 2, 2, 0, -2, -127, 126]);
    assert_eq!(quantize_row(&[f32::MAX, -f32::MAX, 1.0], &mut codes), f32::MAX / 127.0);
    assert_eq!(codes, [127, -127, 0, 0, 0, 0, 0, 0]);
    assert_eq!(quantize_row(&[f32::MIN_POSITIVE, 1e-40], &mut codes), 1e-8);
}

#[test]
fn numbers_that_are_none_are_seen() {
    assert!(all_finite(&[]) && all_finite(&[0.0, -0.0, f32::MAX, f32::MIN, 1e-45]));
    for bad in [f32::NAN, -f32::NAN, f32::INFINITY, f32::NEG_INFINITY, f32::from_bits(0x7f80_0001)] {
        assert!(!all_finite(&[1.0, bad, 2.0]));
    }
}
