//! A model's shape from a Hugging Face `config.json`.

use serde_json::{Map, Value};

use crate::architecture::{Architecture, Block, Mlp, Nonlinearity, Norm};
use crate::error::ShardError;

/// Reads the shape of a decoder-only model. Llama, Mistral, Qwen, Gemma, GPT-2 and GPT-NeoX name their fields differently;
/// each is looked for under all its names. What is optional in these files has the default that the `transformers` library
/// gives it.
///
/// # Errors
///
/// If the text is not JSON, a needed field is missing (the message gives its names) or has another type, or the sizes do
/// not belong together.
pub fn from_json(text: &str, name: &str) -> Result<Architecture, ShardError> {
    let parse = |error: serde_json::Error| ShardError::Parse { what: "config.json", message: error.to_string() };
    let fields = Fields(serde_json::from_str(text).map_err(parse)?);
    let model_dim = fields.needed(&["hidden_size", "n_embd", "d_model"])?;
    let heads = fields.needed(&["num_attention_heads", "n_head", "num_heads"])?;
    let multiquery = fields.flag("multi_query", false)?;
    let kv_heads = fields.size(&["num_key_value_heads", "num_kv_heads"])?;
    let head_dim = match fields.size(&["head_dim"])? {
        Some(head_dim) => head_dim,
        None if heads > 0 && model_dim % heads == 0 => model_dim / heads,
        None => {
            let expected = format!("a head_dim, because {heads} heads do not divide hidden_size {model_dim}");
            return Err(ShardError::field("head_dim", expected, "none"));
        }
    };
    let kind = fields.text("model_type")?.unwrap_or_default();
    let function = fields.first_text(&["hidden_activation", "hidden_act", "activation_function"])?;
    let (function, gated) = nonlinearity(function.as_deref(), &kind)?;
    let needed_ff = ["intermediate_size", "n_inner", "ffn_dim", "d_ff"];
    let ff_dim = match fields.size(&needed_ff)? {
        Some(ff_dim) => ff_dim,
        None if kind == "gpt2" => 4 * model_dim,
        None => fields.needed(&needed_ff)?,
    };
    let rms = fields.0.contains_key("rms_norm_eps") || kind.starts_with("gemma");
    let parallel = ["parallel_attn", "use_parallel_residual"].iter().map(|name| fields.flag(name, false));
    let parallel = parallel.collect::<Result<Vec<_>, _>>()?.contains(&true);
    let tied = kind.starts_with("gemma") || kind == "gpt2";
    let model = Architecture {
        name: name.to_owned(),
        layers: fields.needed(&["num_hidden_layers", "n_layer", "num_layers"])?,
        model_dim,
        ff_dim,
        heads,
        kv_heads: kv_heads.unwrap_or(if multiquery { 1 } else { heads }),
        head_dim,
        vocabulary: fields.needed(&["vocab_size"])?,
        mlp: if gated { Mlp::Gated(function) } else { Mlp::TwoMatrix(function) },
        block: if parallel { Block::Parallel } else { Block::Serial },
        norm: if rms { Norm::Rms } else { Norm::Layer },
        rotary: kind != "gpt2" && kind != "opt",
        tied_embeddings: fields.flag("tie_word_embeddings", tied)?,
    };
    model.validate()?;
    Ok(model)
}

/// The function, and whether a gate stands beside it: families with `silu` or of Gemma's kind have one.
fn nonlinearity(name: Option<&str>, kind: &str) -> Result<(Nonlinearity, bool), ShardError> {
    let gemma = kind.starts_with("gemma");
    match name {
        Some("silu" | "swish") => Ok((Nonlinearity::Silu, true)),
        Some(name) if name.starts_with("gelu") => Ok((Nonlinearity::Gelu, gemma)),
        Some("relu") => Ok((Nonlinearity::Relu, false)),
        None if gemma => Ok((Nonlinearity::Gelu, true)),
        None if kind == "gpt2" => Ok((Nonlinearity::Gelu, false)),
        Some(other) => Err(ShardError::field("hidden_act", "silu, gelu or relu", format!("`{other}`"))),
        None => Err(missing(&["hidden_act", "hidden_activation", "activation_function"])),
    }
}

fn missing(names: &[&str]) -> ShardError {
    ShardError::field(format!("config.json: {}", names[0]), format!("a field {}", names.join(" or ")), "none")
}

struct Fields(Map<String, Value>);

impl Fields {
    /// The first of the names that is there and not null.
    fn find<'a>(&self, names: &[&'a str]) -> Option<(&'a str, &Value)> {
        names.iter().find_map(|name| Some((*name, self.0.get(*name).filter(|value| !value.is_null())?)))
    }

    fn size(&self, names: &[&str]) -> Result<Option<usize>, ShardError> {
        let Some((name, value)) = self.find(names) else { return Ok(None) };
        let size = value.as_u64().and_then(|n| usize::try_from(n).ok()).filter(|&n| n > 0);
        let refuse = || ShardError::field(format!("config.json: {name}"), "a positive whole number", value);
        size.map(Some).ok_or_else(refuse)
    }

    fn needed(&self, names: &[&str]) -> Result<usize, ShardError> {
        self.size(names)?.ok_or_else(|| missing(names))
    }

    fn text(&self, name: &str) -> Result<Option<String>, ShardError> {
        self.first_text(&[name])
    }

    fn first_text(&self, names: &[&str]) -> Result<Option<String>, ShardError> {
        let Some((name, value)) = self.find(names) else { return Ok(None) };
        let text = value.as_str().map(|text| Some(text.to_owned()));
        text.ok_or_else(|| ShardError::field(format!("config.json: {name}"), "text", value))
    }

    fn flag(&self, name: &str, default: bool) -> Result<bool, ShardError> {
        let Some((_, value)) = self.find(&[name]) else { return Ok(default) };
        value.as_bool().ok_or_else(|| ShardError::field(format!("config.json: {name}"), "true or false", value))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::models;

    const LLAMA_3_8B: &str = r#"{
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "hidden_size": 4096,
        "intermediate_size": 14336, "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8,
        "rms_norm_eps": 1e-05, "tie_word_embeddings": false, "vocab_size": 128256
    }"#;

    #[test]
    fn llama_is_the_built_in_one() {
        assert_eq!(from_json(LLAMA_3_8B, "llama-3-8b").unwrap(), models::by_name("llama-3-8b").unwrap());
    }

    #[test]
    fn gemma_and_gpt2_name_fields_differently() {
        let gemma = r#"{"model_type": "gemma2", "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 3584,
            "intermediate_size": 14336, "num_attention_heads": 16, "num_hidden_layers": 42, "num_key_value_heads": 8,
            "head_dim": 256, "rms_norm_eps": 1e-06, "vocab_size": 256000}"#;
        assert_eq!(from_json(gemma, "gemma-2-9b").unwrap(), models::by_name("gemma-2-9b").unwrap());
        let gpt2 = r#"{"model_type": "gpt2", "activation_function": "gelu_new", "n_embd": 768, "n_head": 12,
            "n_layer": 12, "n_inner": null, "vocab_size": 50257}"#;
        let gpt2 = from_json(gpt2, "gpt2").unwrap();
        assert_eq!((gpt2.ff_dim, gpt2.head_dim, gpt2.kv_heads, gpt2.tied_embeddings), (3072, 64, 12, true));
        assert_eq!(gpt2.mlp, Mlp::TwoMatrix(Nonlinearity::Gelu));
    }

    #[test]
    fn what_is_missing_or_wrong_is_named() {
        let error = |from: &str, to: &str| from_json(&LLAMA_3_8B.replace(from, to), "m").unwrap_err().to_string();
        assert_eq!(
            error("\"intermediate_size\": 14336, ", ""),
            "config.json: intermediate_size: expected a field intermediate_size or n_inner or ffn_dim or d_ff, got none"
        );
        assert_eq!(error("4096", "-4"), "config.json: hidden_size: expected a positive whole number, got -4");
        assert_eq!(error("4096", "0"), "config.json: hidden_size: expected a positive whole number, got 0");
        assert_eq!(error("\"silu\"", "\"mish\""), "hidden_act: expected silu, gelu or relu, got `mish`");
        assert_eq!(error("_heads\": 8", "_heads\": 5"), "heads: expected a multiple of the 5 key heads, got 32");
        assert!(error("{", "").starts_with("config.json: "));
    }
}
