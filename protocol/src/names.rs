//! One table of names: diffusers ↔ BFL (the single-file checkpoints), adapter suffixes, wrapper prefixes, aliases.
//!
//! Inside Serenity a tensor has its diffusers name and nothing else. BFL files fuse q, k and v into one tensor and keep the two halves
//! of the last modulation in the other order; a [`Rows`] says which rows of the BFL tensor a diffusers tensor is. The aliases are
//! those of StageHand's key matching, which knew them in one direction only.

/// Which rows of a BFL tensor make up the diffusers tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Rows {
    /// All, in order.
    All,
    /// The n-th third (q, k, v of a fused projection).
    Third(u8),
    /// All, with the two halves exchanged.
    SwappedHalves,
}

/// Diffusers ↔ BFL outside the blocks, without `.weight`.
const TOP: &[(&str, &str, Rows)] = &[
    ("x_embedder", "img_in", Rows::All),
    ("context_embedder", "txt_in", Rows::All),
    ("time_guidance_embed.timestep_embedder.linear_1", "time_in.in_layer", Rows::All),
    ("time_guidance_embed.timestep_embedder.linear_2", "time_in.out_layer", Rows::All),
    ("time_guidance_embed.guidance_embedder.linear_1", "guidance_in.in_layer", Rows::All),
    ("time_guidance_embed.guidance_embedder.linear_2", "guidance_in.out_layer", Rows::All),
    ("double_stream_modulation_img.linear", "double_stream_modulation_img.lin", Rows::All),
    ("double_stream_modulation_txt.linear", "double_stream_modulation_txt.lin", Rows::All),
    ("single_stream_modulation.linear", "single_stream_modulation.lin", Rows::All),
    // BFL rows are [shift; scale], diffusers' are [scale; shift].
    ("norm_out.linear", "final_layer.adaLN_modulation.1", Rows::SwappedHalves),
    ("proj_out", "final_layer.linear", Rows::All),
];

/// `transformer_blocks.N.` ↔ `double_blocks.N.`
const DOUBLE: &[(&str, &str, Rows)] = &[
    ("attn.to_q", "img_attn.qkv", Rows::Third(0)),
    ("attn.to_k", "img_attn.qkv", Rows::Third(1)),
    ("attn.to_v", "img_attn.qkv", Rows::Third(2)),
    ("attn.add_q_proj", "txt_attn.qkv", Rows::Third(0)),
    ("attn.add_k_proj", "txt_attn.qkv", Rows::Third(1)),
    ("attn.add_v_proj", "txt_attn.qkv", Rows::Third(2)),
    ("attn.to_out.0", "img_attn.proj", Rows::All),
    ("attn.to_add_out", "txt_attn.proj", Rows::All),
    ("ff.linear_in", "img_mlp.0", Rows::All),
    ("ff.linear_out", "img_mlp.2", Rows::All),
    ("ff_context.linear_in", "txt_mlp.0", Rows::All),
    ("ff_context.linear_out", "txt_mlp.2", Rows::All),
    ("attn.norm_q", "img_attn.norm.query_norm", Rows::All),
    ("attn.norm_k", "img_attn.norm.key_norm", Rows::All),
    ("attn.norm_added_q", "txt_attn.norm.query_norm", Rows::All),
    ("attn.norm_added_k", "txt_attn.norm.key_norm", Rows::All),
];

/// `single_transformer_blocks.N.` ↔ `single_blocks.N.`
const SINGLE: &[(&str, &str, Rows)] = &[
    ("attn.to_qkv_mlp_proj", "linear1", Rows::All),
    ("attn.to_out", "linear2", Rows::All),
    ("attn.norm_q", "norm.query_norm", Rows::All),
    ("attn.norm_k", "norm.key_norm", Rows::All),
];

/// Prefixes that tools put before the transformer's own names.
pub const WRAPPER_PREFIXES: &[&str] = &["model.diffusion_model.", "diffusion_model.", "model.", "transformer."];

/// Name parts that adapter libraries put between a module and its parameters.
pub const ADAPTER_PARTS: &[&str] = &["orig", "org_module", "base_layer"];

/// (alias, name in FLUX.2's diffusers terms), matched as whole dotted parts.
pub const ALIASES: &[(&str, &str)] = &[
    ("ff.net.0.proj", "ff.linear_in"),
    ("ff.net.2", "ff.linear_out"),
    ("ff_context.net.0.proj", "ff_context.linear_in"),
    ("ff_context.net.2", "ff_context.linear_out"),
];

/// The BFL tensor behind a diffusers tensor (both with their endings: `.weight`, or `.scale` for BFL norms), and its rows.
/// `None` if the name is no tensor of a FLUX.2 transformer.
#[must_use]
pub fn bfl_of(diffusers: &str) -> Option<(String, Rows)> {
    let module = diffusers.strip_suffix(".weight")?;
    let of_block = |rest: &str, table: &[(&str, &str, Rows)], prefix: &str| {
        let (index, name) = rest.split_once('.')?;
        index.parse::<u16>().ok()?;
        let (_, bfl, rows) = table.iter().find(|(d, ..)| *d == name)?;
        let ending = if bfl.ends_with("_norm") { "scale" } else { "weight" };
        Some((format!("{prefix}.{index}.{bfl}.{ending}"), *rows))
    };
    if let Some(rest) = module.strip_prefix("transformer_blocks.") {
        return of_block(rest, DOUBLE, "double_blocks");
    }
    if let Some(rest) = module.strip_prefix("single_transformer_blocks.") {
        return of_block(rest, SINGLE, "single_blocks");
    }
    TOP.iter().find(|(d, ..)| *d == module).map(|(_, bfl, rows)| (format!("{bfl}.weight"), *rows))
}

/// The diffusers tensors that a BFL tensor holds, with their rows; empty if the name is no tensor of a FLUX.2 transformer.
#[must_use]
pub fn diffusers_of(bfl: &str) -> Vec<(String, Rows)> {
    let Some((module, ending)) = bfl.rsplit_once('.') else { return Vec::new() };
    let expected_ending = if module.ends_with("_norm") { "scale" } else { "weight" };
    if ending != expected_ending {
        return Vec::new();
    }
    let (table, prefix, module) = if let Some(rest) = module.strip_prefix("double_blocks.") {
        (DOUBLE, "transformer_blocks.", rest)
    } else if let Some(rest) = module.strip_prefix("single_blocks.") {
        (SINGLE, "single_transformer_blocks.", rest)
    } else {
        (TOP, "", module)
    };
    let (index, name) = match (prefix, module.split_once('.')) {
        ("", _) => (String::new(), module),
        (_, Some((index, name))) if index.parse::<u16>().is_ok() => (format!("{index}."), name),
        _ => return Vec::new(),
    };
    let hits = table.iter().filter(|(_, b, _)| *b == name);
    hits.map(|(diffusers, _, rows)| (format!("{prefix}{index}{diffusers}.weight"), *rows)).collect()
}

/// The diffusers name (without `.weight`) of a linear however it was wrapped: endings `.weight`/`.bias`, adapter parts and wrapper
/// prefixes are dropped, aliases replaced. A name that is canonical already comes back unchanged.
#[must_use]
pub fn canonical_linear(name: &str) -> String {
    let name = name.strip_suffix(".weight").or_else(|| name.strip_suffix(".bias")).unwrap_or(name);
    let name = WRAPPER_PREFIXES.iter().find_map(|p| name.strip_prefix(p)).unwrap_or(name);
    let kept: Vec<&str> = name.split('.').filter(|part| !ADAPTER_PARTS.contains(part)).collect();
    let name = kept.join(".");
    for (alias, real) in ALIASES {
        if let Some(head) = name.strip_suffix(alias)
            && (head.is_empty() || head.ends_with('.'))
        {
            return format!("{head}{real}");
        }
    }
    name
}

/// Every spelling under which other tools may know a canonical linear: itself, its aliases, with each adapter ending and prefix.
#[must_use]
pub fn spellings(canonical: &str) -> Vec<String> {
    let mut plain = vec![canonical.to_owned()];
    for (alias, real) in ALIASES {
        if let Some(head) = canonical.strip_suffix(real)
            && (head.is_empty() || head.ends_with('.'))
        {
            plain.push(format!("{head}{alias}"));
        }
    }
    let mut all = Vec::new();
    for name in plain {
        for prefix in std::iter::once(&"").chain(WRAPPER_PREFIXES) {
            all.push(format!("{prefix}{name}"));
            all.extend(ADAPTER_PARTS.iter().map(|part| format!("{prefix}{name}.{part}")));
        }
    }
    all
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::*;

    #[test]
    fn every_spelling_is_recognised() {
        for canonical in [
            "transformer_blocks.7.ff.linear_in",
            "transformer_blocks.0.ff_context.linear_out",
            "single_transformer_blocks.3.attn.to_out",
            "proj_out",
        ] {
            for spelling in spellings(canonical) {
                assert_eq!(canonical_linear(&spelling), canonical, "{spelling}");
                assert_eq!(canonical_linear(&format!("{spelling}.weight")), canonical, "{spelling}.weight");
            }
        }
        assert!(spellings("transformer_blocks.7.ff.linear_in").contains(&"transformer_blocks.7.ff.net.0.proj.base_layer".to_string()));
        assert_eq!(canonical_linear("transformer_blocks.1.attn.to_q.orig.weight"), "transformer_blocks.1.attn.to_q");
        assert_eq!(canonical_linear("transformer_blocks.1.attn.to_out.0"), "transformer_blocks.1.attn.to_out.0");
    }

    #[test]
    fn both_directions_agree() {
        let geometry: crate::geometry::TransformerGeometry = serde_json::from_str(
            r#"{"in_channels":16,"num_layers":2,"num_single_layers":3,"attention_head_dim":32,"num_attention_heads":2,"joint_attention_dim":240,"axes_dims_rope":[8,8,8,8]}"#,
        )
        .unwrap();
        for (name, _) in geometry.all_tensors() {
            let (bfl, rows) = bfl_of(&name).expect(&name);
            assert!(diffusers_of(&bfl).contains(&(name.clone(), rows)), "{name} -> {bfl}");
        }
        assert_eq!(bfl_of("transformer_blocks.0.attn.to_qkv_mlp_proj.weight"), None);
        assert_eq!(bfl_of("transformer_blocks.x.attn.to_q.weight"), None);
        assert!(diffusers_of("double_blocks.0.img_attn.norm.query_norm.weight").is_empty());
        assert_eq!(diffusers_of("double_blocks.4.txt_attn.qkv.weight").len(), 3);
    }
}
