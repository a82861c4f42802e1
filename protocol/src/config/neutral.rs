//! Keys of the original that have no meaning here: accepted with the value that means "off", refused with the reason otherwise.
//!
//! Dropping such a key in silence would train something else than the file asks for; refusing it outright would stop files that only
//! spell out a default.

use serde_json::{Value, json};

use super::raw::{RawAdapter, RawCheckpoint, RawConfig, RawData, RawDistributed, RawMemory, RawOptimizer, RawStagehand, Unsupported};
use crate::error::{Error, Result};

/// One key: its path, its value, the values that change nothing, and why no other is accepted.
type Row<'a> = (&'static str, &'a Unsupported, Vec<Value>, &'static str);

/// Refuses the first key whose value would mean something that does not exist here.
pub(super) fn check(raw: &RawConfig) -> Result<()> {
    let stagehand = raw.memory.stagehand.as_ref();
    let rows = root(raw)
        .into_iter()
        .chain(adapter(&raw.adapter))
        .chain(memory(&raw.memory))
        .chain(stagehand.into_iter().flat_map(stagehand_rows))
        .chain(data(&raw.data))
        .chain(optimizer(&raw.optimizer))
        .chain(checkpoint(&raw.checkpoint))
        .chain(distributed(&raw.distributed));
    for (key, value, neutral, why) in rows {
        if let Some(value) = value
            && !neutral.iter().any(|n| same(n, value))
        {
            let neutral: Vec<String> = neutral.iter().map(Value::to_string).collect();
            return Err(Error::config(format!("`{key}` cannot be {value}: {why}"))
                .expected(if neutral.is_empty() { "the key to be absent".to_string() } else { neutral.join(" or ") })
                .found(value)
                .advice(format!("remove `{key}`, or give it the expected value")));
        }
    }
    if raw.sample.enabled == Some(true) {
        return Err(Error::config("`sample.enabled` cannot be true: the trainer draws no sample images")
            .found(true)
            .advice("set sample.enabled to false; the validation section measures a validation loss instead"));
    }
    Ok(())
}

/// Equality of JSON values with 1 = 1.0 and names in any case.
fn same(a: &Value, b: &Value) -> bool {
    match (a, b) {
        (Value::Number(a), Value::Number(b)) => a.as_f64() == b.as_f64(),
        (Value::String(a), Value::String(b)) => a.eq_ignore_ascii_case(b),
        _ => a == b,
    }
}

fn off() -> Vec<Value> {
    vec![json!(false)]
}

fn zero() -> Vec<Value> {
    vec![json!(0)]
}

const NO_VARIANT: &str = "LoRA is the only adapter, and its keys are in `adapter`";
const PLAIN_LORA: &str = "only plain LoRA is trained";
const SLAB_ONLY: &str = "frozen weights always come from the INT8 slab";
const RING_INSTEAD: &str = "blocks stream through the ring (`memory.stagehand`), which takes the place of the older offloading";
const ADAMW_ONLY: &str = "the optimiser is AdamW, which has no such option";
const ONE_PROCESS: &str = "one trainer on one device";
const ALWAYS_CACHED: &str = "embeddings and latents are always computed once, before training";

fn root(r: &RawConfig) -> Vec<Row<'_>> {
    vec![
        ("training_method", &r.training_method, vec![json!("lora")], "only LoRA training exists"),
        ("temp_device", &r.temp_device, vec![json!("cpu")], "nothing is parked on another device"),
        (
            "output_dtype",
            &r.output_dtype,
            vec![json!("float32"), json!("fp32"), json!("float_32")],
            "the LoRA is written in float32, as it was trained",
        ),
        (
            "save_full_model",
            &r.save_full_model,
            vec![json!(true), json!(false)],
            "a switch is true or false (a LoRA run never saves the model)",
        ),
        ("cache_text_embeddings", &r.cache_text_embeddings, vec![json!(true)], ALWAYS_CACHED),
        ("ema_mode", &r.ema_mode, vec![json!("off"), json!("none")], "no moving average of the adapters is kept"),
        ("ema_decay", &r.ema_decay, vec![json!(0.999)], "no moving average of the adapters is kept"),
        ("quantization", &r.quantization, vec![json!("none"), json!("off")], SLAB_ONLY),
        ("blocks_to_swap", &r.blocks_to_swap, zero(), RING_INSTEAD),
        ("layer_offload_fraction", &r.layer_offload_fraction, zero(), RING_INSTEAD),
        ("debug_memory", &r.debug_memory, off(), "memory is in log.jsonl and in --trace"),
        ("per_layer_lr", &r.per_layer_lr, vec![json!({}), json!({"enabled": false})], "all adapters share one learning rate"),
        ("lora", &r.lora, vec![json!({})], NO_VARIANT),
        ("dora", &r.dora, vec![json!({})], NO_VARIANT),
        ("lokr", &r.lokr, vec![json!({})], NO_VARIANT),
        ("loha", &r.loha, vec![json!({})], NO_VARIANT),
        ("locon", &r.locon, vec![json!({})], NO_VARIANT),
        ("ia3", &r.ia3, vec![json!({})], NO_VARIANT),
        ("oft", &r.oft, vec![json!({})], NO_VARIANT),
        ("boft", &r.boft, vec![json!({})], NO_VARIANT),
        ("diag_oft", &r.diag_oft, vec![json!({})], NO_VARIANT),
        ("glora", &r.glora, vec![json!({})], NO_VARIANT),
        ("dylora", &r.dylora, vec![json!({})], NO_VARIANT),
        ("lycoris", &r.lycoris, vec![json!({})], NO_VARIANT),
        (
            "model.text_encoder_model_name",
            &r.model.text_encoder_model_name,
            vec![],
            "the text encoder is the model's own, or the folder model.text_encoder_path",
        ),
        ("logging.enable_tensorboard", &r.logging.enable_tensorboard, off(), "the log is log.jsonl and a plot"),
    ]
}

fn adapter(a: &RawAdapter) -> Vec<Row<'_>> {
    vec![
        ("adapter.type", &a.kind, vec![json!("lora")], PLAIN_LORA),
        ("adapter.dropout", &a.dropout, zero(), PLAIN_LORA),
        (
            "adapter.rs_lora",
            &a.rs_lora,
            off(),
            "the branch is scaled by alpha / rank; set adapter.alpha to alpha * sqrt(rank) for the same effect",
        ),
        ("adapter.multiplier", &a.multiplier, vec![json!(1)], "the branch is scaled by alpha / rank alone"),
        ("adapter.conv_rank", &a.conv_rank, zero(), "the transformer has no convolution"),
        ("adapter.conv_alpha", &a.conv_alpha, zero(), "the transformer has no convolution"),
        ("adapter.rank_dropout", &a.rank_dropout, zero(), PLAIN_LORA),
        ("adapter.module_dropout", &a.module_dropout, zero(), PLAIN_LORA),
        ("adapter.factor", &a.factor, vec![json!(2)], PLAIN_LORA),
        ("adapter.decompose_both", &a.decompose_both, off(), PLAIN_LORA),
        ("adapter.use_tucker", &a.use_tucker, off(), PLAIN_LORA),
        ("adapter.full_matrix", &a.full_matrix, off(), PLAIN_LORA),
        ("adapter.weight_decompose", &a.weight_decompose, off(), PLAIN_LORA),
        ("adapter.dora_wd", &a.dora_wd, off(), PLAIN_LORA),
        ("adapter.dora_on_output", &a.dora_on_output, vec![json!(true)], PLAIN_LORA),
        ("adapter.block_size", &a.block_size, vec![json!(4)], PLAIN_LORA),
        ("adapter.constraint", &a.constraint, zero(), PLAIN_LORA),
        ("adapter.rescaled", &a.rescaled, off(), PLAIN_LORA),
        ("adapter.backend", &a.backend, vec![json!("native")], "there is one implementation"),
    ]
}

fn memory(m: &RawMemory) -> Vec<Row<'_>> {
    const RECOMPUTED: &str = "the backward pass always recomputes a block from its kept input; without that nothing would fit";
    vec![
        ("memory.gradient_checkpointing", &m.gradient_checkpointing, vec![json!("on"), json!(true)], RECOMPUTED),
        ("memory.enable_activation_offloading", &m.enable_activation_offloading, off(), "block inputs stay on the device"),
        ("memory.enable_async_offloading", &m.enable_async_offloading, off(), RING_INSTEAD),
        ("memory.layer_offload_fraction", &m.layer_offload_fraction, zero(), RING_INSTEAD),
        ("memory.blocks_to_swap", &m.blocks_to_swap, zero(), RING_INSTEAD),
        ("memory.quantization", &m.quantization, vec![json!("none"), json!("off")], SLAB_ONLY),
        ("memory.quantized_gpu_memory_gib", &m.quantized_gpu_memory_gib, zero(), SLAB_ONLY),
    ]
}

fn stagehand_rows(s: &RawStagehand) -> Vec<Row<'_>> {
    const TYPED: &str = "types are fixed when the weights are loaded, so they cannot change on the way";
    let powers = (0..=12).map(|p| json!(1_u32 << p)).collect();
    vec![
        (
            "memory.stagehand.pinned_slab_alignment",
            &s.pinned_slab_alignment,
            powers,
            "slots are aligned to 4096 bytes, which satisfies a power of two up to 4096",
        ),
        ("memory.stagehand.copy_stream_priority", &s.copy_stream_priority, vec![json!(-1)], "copies always have the higher priority"),
        ("memory.stagehand.policy", &s.policy, vec![json!("static")], "there is one policy: the trainer announces the order of blocks"),
        (
            "memory.stagehand.eviction_cooldown_steps",
            &s.eviction_cooldown_steps,
            vec![json!(0), json!(2)],
            "what to evict follows from the announced order of blocks; the original never applied a cool-down either",
        ),
        ("memory.stagehand.strict_bf16", &s.strict_bf16, vec![json!(true)], TYPED),
        ("memory.stagehand.fail_on_dtype_promotion", &s.fail_on_dtype_promotion, vec![json!(true)], TYPED),
        ("memory.stagehand.debug_trace", &s.debug_trace, off(), "use --trace FILE.json"),
        ("memory.stagehand.family", &s.family, vec![json!("flux2"), json!("flux_2"), json!("flux_2_dev")], "the model is FLUX.2"),
        ("memory.stagehand.block_pattern", &s.block_pattern, vec![], "the blocks follow from the model's geometry"),
        (
            "memory.stagehand.gradient_checkpointing",
            &s.gradient_checkpointing,
            vec![json!("on"), json!(true)],
            "the backward pass always recomputes a block",
        ),
        ("memory.stagehand.file_backed_weights", &s.file_backed_weights, off(), "blocks always come from the slab file"),
        ("memory.stagehand.checkpoint_path", &s.checkpoint_path, vec![], "the checkpoint is model.path"),
        (
            "memory.stagehand.two_stage",
            &s.two_stage,
            vec![json!(true), json!(false)],
            "a switch is true or false (the encoder always runs before training)",
        ),
        (
            "memory.stagehand.text_encoder_block_swap",
            &s.text_encoder_block_swap,
            vec![json!(true), json!(false)],
            "a switch is true or false (the encoder always goes layer by layer)",
        ),
        ("memory.stagehand.encoder_family", &s.encoder_family, vec![json!("mistral"), json!("mistral3")], "the text encoder is Mistral 3"),
        (
            "memory.stagehand.activation_stagehand",
            &s.activation_stagehand,
            vec![json!({}), json!({"enabled": false})],
            "block inputs stay on the device",
        ),
        (
            "memory.stagehand.conductor_config",
            &s.conductor_config,
            vec![json!({}), json!({"enabled": false})],
            "the watermarks alone bound the device",
        ),
        (
            "memory.stagehand.selective_precision",
            &s.selective_precision,
            vec![json!({}), json!({"mode": "off"}), json!({"enabled": false})],
            "every block has the slab's precision",
        ),
    ]
}

fn data(d: &RawData) -> Vec<Row<'_>> {
    vec![
        ("data.num_workers", &d.num_workers, zero(), "images are read once, by the encoder"),
        ("data.cache_latents", &d.cache_latents, vec![json!(true)], ALWAYS_CACHED),
        ("data.cache_text_embeddings", &d.cache_text_embeddings, vec![json!(true)], ALWAYS_CACHED),
        ("data.frames", &d.frames, vec![json!(1)], "the model makes still images"),
        ("data.edit_mode", &d.edit_mode, off(), "samples are one image and one caption"),
        ("data.custom_conditioning_image", &d.custom_conditioning_image, off(), "samples are one image and one caption"),
    ]
}

fn optimizer(o: &RawOptimizer) -> Vec<Row<'_>> {
    vec![
        ("optimizer.amsgrad", &o.amsgrad, off(), ADAMW_ONLY),
        ("optimizer.momentum", &o.momentum, zero(), ADAMW_ONLY),
        ("optimizer.dampening", &o.dampening, zero(), ADAMW_ONLY),
        ("optimizer.nesterov", &o.nesterov, off(), ADAMW_ONLY),
        ("optimizer.clip_threshold", &o.clip_threshold, vec![json!(1)], ADAMW_ONLY),
        ("optimizer.scale_parameter", &o.scale_parameter, off(), ADAMW_ONLY),
        ("optimizer.relative_step", &o.relative_step, off(), ADAMW_ONLY),
        ("optimizer.warmup_init", &o.warmup_init, off(), ADAMW_ONLY),
    ]
}

fn checkpoint(c: &RawCheckpoint) -> Vec<Row<'_>> {
    vec![
        (
            "checkpoint.save_full_model",
            &c.save_full_model,
            vec![json!(true), json!(false)],
            "a switch is true or false (a LoRA run never saves the model)",
        ),
        ("checkpoint.backup_every", &c.backup_every, zero(), "checkpoints are complete; use checkpoint.save_every"),
        ("checkpoint.save_every_unit", &c.save_every_unit, vec![json!("step"), json!("steps")], "checkpoints are counted in steps"),
    ]
}

fn distributed(d: &RawDistributed) -> Vec<Row<'_>> {
    vec![
        ("distributed.enabled", &d.enabled, off(), ONE_PROCESS),
        ("distributed.world_size", &d.world_size, vec![json!(1)], ONE_PROCESS),
        ("distributed.rank", &d.rank, zero(), ONE_PROCESS),
        ("distributed.local_rank", &d.local_rank, zero(), ONE_PROCESS),
        ("distributed.backend", &d.backend, vec![json!("nccl")], ONE_PROCESS),
        ("distributed.master_addr", &d.master_addr, vec![json!("localhost"), json!("127.0.0.1")], ONE_PROCESS),
        ("distributed.master_port", &d.master_port, vec![json!(29500)], ONE_PROCESS),
    ]
}
