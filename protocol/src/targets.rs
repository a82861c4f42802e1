//! Which linears get an adapter.
//!
//! An entry of `adapter.target_modules` matches a block linear whose name ends in `.ENTRY` or `.ENTRY.0` (a full name matches itself).
//! The original matched by substring, so `attn.to_q` also hit the single blocks' `attn.to_qkv_mlp_proj`; here that needs its own entry.
//! What an entry matched is counted and shown, an entry without any match is an error, and a preset that leaves out the single blocks'
//! fused projection is told so. Launcher (for the plan) and trainer both call [`match_targets`].
#![forbid(unsafe_code)]

use std::collections::BTreeSet;

use crate::config::Targets;
use crate::error::{Error, Result};
use crate::geometry::{LinearSpec, TransformerGeometry};

/// Name, within a single block, of the projection to q, k, v and feed-forward.
const FUSED: &str = "attn.to_qkv_mlp_proj";

/// The linears that get an adapter, and how they came to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TargetMatch {
    /// Each once, in execution order of the blocks and payload order within a block.
    pub linears: Vec<LinearSpec>,
    /// Each entry with the number of linears that it matched (`all-linear` is one entry).
    pub per_entry: Vec<(String, usize)>,
    /// What the user should know about the choice.
    pub notes: Vec<String>,
}

impl TargetMatch {
    /// Trainable parameters at `rank`: r (in + out) for each linear.
    #[must_use]
    pub fn parameters(&self, rank: usize) -> u64 {
        self.linears.iter().map(|l| rank as u64 * (l.in_features as u64 + l.out_features as u64)).sum()
    }
}

/// Matches `targets` against the linears of every block.
///
/// # Errors
/// [`Error::Config`] naming the entries that match nothing, with the names that could be used.
pub fn match_targets(geometry: &TransformerGeometry, targets: &Targets) -> Result<TargetMatch> {
    let all: Vec<LinearSpec> = geometry.blocks().flat_map(|b| geometry.block_linears(b)).collect();
    let entries = match targets {
        Targets::AllLinear => {
            let per_entry = vec![("all-linear".to_string(), all.len())];
            return Ok(TargetMatch { linears: all, per_entry, notes: Vec::new() });
        }
        Targets::Entries(entries) => entries,
    };
    let per_entry: Vec<(String, usize)> = entries.iter().map(|e| (e.clone(), all.iter().filter(|l| matches(&l.name, e)).count())).collect();
    let none: Vec<&str> = per_entry.iter().filter(|(_, n)| *n == 0).map(|(e, _)| e.as_str()).collect();
    if !none.is_empty() {
        return Err(no_match(geometry, &all, &none));
    }
    let linears: Vec<LinearSpec> = all.into_iter().filter(|l| entries.iter().any(|e| matches(&l.name, e))).collect();
    let notes = notes(geometry, &linears, entries);
    Ok(TargetMatch { linears, per_entry, notes })
}

/// Whether `entry` matches the linear `name`.
fn matches(name: &str, entry: &str) -> bool {
    let ends = |name: &str| name.strip_suffix(entry).is_some_and(|front| front.is_empty() || front.ends_with('.'));
    ends(name) || name.strip_suffix(".0").is_some_and(ends)
}

/// The name within its block: `attn.to_q` of `transformer_blocks.3.attn.to_q`.
fn within_block(name: &str) -> &str {
    name.splitn(3, '.').nth(2).unwrap_or(name)
}

fn no_match(geometry: &TransformerGeometry, all: &[LinearSpec], none: &[&str]) -> Error {
    let names: BTreeSet<&str> = all.iter().map(|l| within_block(&l.name)).map(|n| n.strip_suffix(".0").unwrap_or(n)).collect();
    let outside: Vec<&str> = none.iter().copied().filter(|e| geometry.other_linears().iter().any(|l| matches(&l.name, e))).collect();
    let advice = if outside.is_empty() {
        "correct or remove them, or write \"all-linear\"".to_string()
    } else {
        format!("remove them: {} lies outside the blocks, and only block linears are adapted", outside.join(", "))
    };
    Error::config(format!("adapter.target_modules has entries that match no block linear: {}", none.join(", ")))
        .expected(format!("one of {}, or a full name", names.into_iter().collect::<Vec<_>>().join(", ")))
        .advice(advice)
}

fn notes(geometry: &TransformerGeometry, linears: &[LinearSpec], entries: &[String]) -> Vec<String> {
    let mut notes = Vec::new();
    let singles = geometry.num_single_layers;
    let fused = linears.iter().filter(|l| within_block(&l.name) == FUSED).count();
    if fused < singles {
        notes.push(format!(
            "{} of {singles} single blocks train without their fused projection {FUSED} (q, k, v and feed-forward): \
             add \"{FUSED}\" to adapter.target_modules to train it",
            singles - fused
        ));
    }
    let repeated: BTreeSet<&String> =
        entries.iter().enumerate().filter(|(i, e)| entries.iter().take(*i).any(|f| f == *e)).map(|(_, e)| e).collect();
    notes.extend(repeated.into_iter().map(|e| format!("the entry {e} is given more than once")));
    notes
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::*;

    fn geometry(double: usize, single: usize, heads: usize) -> TransformerGeometry {
        TransformerGeometry {
            in_channels: 128,
            out_channels: None,
            num_layers: double,
            num_single_layers: single,
            attention_head_dim: 128,
            num_attention_heads: heads,
            joint_attention_dim: 15_360,
            timestep_guidance_channels: 256,
            mlp_ratio: 3.0,
            axes_dims_rope: vec![32; 4],
            rope_theta: 2000.0,
            eps: 1e-6,
            guidance_embeds: true,
        }
    }

    fn entries(names: &[&str]) -> Targets {
        Targets::Entries(names.iter().map(|s| s.to_string()).collect())
    }

    const CASE_STUDY: [&str; 8] =
        ["attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out", "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"];

    /// 8 linears of each of the 8 double blocks and `attn.to_out` of each of the 48 single blocks; parameters by the formula r (in + out).
    #[test]
    fn the_case_study_targets_of_the_full_model() {
        let found = match_targets(&geometry(8, 48, 48), &entries(&CASE_STUDY)).unwrap();
        assert_eq!(found.linears.len(), 8 * 8 + 48);
        for (entry, count) in &found.per_entry {
            assert_eq!(*count, if entry == "attn.to_out" { 8 + 48 } else { 8 }, "{entry}");
        }
        assert!(found.linears.iter().all(|l| !l.name.ends_with(FUSED)));
        assert!(found.notes.iter().any(|n| n.contains("48 of 48 single blocks") && n.contains(FUSED)), "{:?}", found.notes);
        assert_eq!(found.parameters(16), 64 * 16 * (6144 + 6144) + 48 * 16 * (24_576 + 6144));
    }

    #[test]
    fn all_linear_takes_every_block_linear_and_nothing_else() {
        let g = geometry(8, 48, 48);
        let found = match_targets(&g, &Targets::AllLinear).unwrap();
        assert_eq!(found.linears.len(), 192);
        assert!(found.notes.is_empty());
        let others = g.other_linears();
        assert!(found.linears.iter().all(|l| !others.contains(l)));
        // spec/flux2.md 4.3, the same per block.
        let (d, m) = (6144_u64, 18_432_u64);
        let double = 8 * 2 * d + 2 * (d + 2 * m) + 2 * (m + d);
        let single = (d + 3 * d + 2 * m) + (2 * d + m);
        assert_eq!(found.parameters(1), 8 * double + 48 * single);
    }

    #[test]
    fn matching_respects_the_dots_of_a_name() {
        for (name, entry, expected) in [
            ("transformer_blocks.0.attn.to_q", "attn.to_q", true),
            ("transformer_blocks.0.attn.to_q", "to_q", true),
            ("transformer_blocks.0.attn.to_q", "o_q", false),
            ("transformer_blocks.0.attn.to_q", "transformer_blocks.0.attn.to_q", true),
            ("single_transformer_blocks.0.attn.to_out", "transformer_blocks.0.attn.to_out", false),
            ("transformer_blocks.0.attn.to_out.0", "attn.to_out", true),
            ("transformer_blocks.0.attn.to_out.0", "attn.to_out.0", true),
            ("single_transformer_blocks.0.attn.to_out", "attn.to_out.0", false),
            ("single_transformer_blocks.0.attn.to_qkv_mlp_proj", "attn.to_q", false),
            ("transformer_blocks.0.ff.linear_in", "ff", false),
        ] {
            assert_eq!(matches(name, entry), expected, "{name} {entry}");
        }
    }

    #[test]
    fn entries_without_a_match_are_named_and_overlapping_ones_count_once() {
        let g = geometry(1, 2, 1);
        let error = match_targets(&g, &entries(&["attn.to_q", "attn.to_x", "proj_out"])).unwrap_err();
        assert_eq!(error.exit_code(), 64);
        let message = error.to_string();
        assert!(message.contains("attn.to_x, proj_out") && message.contains("outside the blocks"), "{message}");
        let found = match_targets(&g, &entries(&["to_out", "attn.to_out", "to_out"])).unwrap();
        assert_eq!(found.linears.len(), 3);
        assert!(found.notes.iter().any(|n| n.contains("more than once")));
        // No single blocks: nothing is left out, and nothing is said to be.
        assert!(match_targets(&geometry(2, 0, 1), &entries(&["attn.to_q"])).unwrap().notes.is_empty());
        assert!(match_targets(&geometry(0, 2, 1), &entries(&["attn.to_q"])).is_err());
    }
}
