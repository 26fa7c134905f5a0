//! Built-in models: shapes as their authors publish them.

use crate::architecture::{Architecture, Block, Mlp, Nonlinearity, Norm};
use crate::error::ShardError;

/// Names of the built-in models.
pub const NAMES: [&str; 19] = [
    "palm-8b",
    "palm-62b",
    "palm-540b",
    "mt-nlg-530b",
    "gpt-3-175b",
    "llama-2-7b",
    "llama-2-13b",
    "llama-2-70b",
    "llama-3-8b",
    "llama-3-70b",
    "llama-3.1-8b",
    "llama-3.1-70b",
    "llama-3.1-405b",
    "llama-3.2-1b",
    "llama-3.2-3b",
    "llama-3.3-70b",
    "gemma-2-2b",
    "gemma-2-9b",
    "gemma-2-27b",
];

/// A built-in model by name.
///
/// # Errors
///
/// If the name is unknown; the message suggests the nearest one.
pub fn by_name(name: &str) -> Result<Architecture, ShardError> {
    // layers, E, F, H, K, Q
    Ok(match name {
        // PaLM: Chowdhery et al., arXiv 2204.02311, table 1. The paper pads the 48 heads of 540B to 64.
        "palm-8b" => palm(name, [32, 4096, 16384, 16, 1, 256]),
        "palm-62b" => palm(name, [64, 8192, 32768, 32, 1, 256]),
        "palm-540b" => palm(name, [118, 18432, 73728, 48, 1, 256]),
        // MT-NLG: Smith et al., arXiv 2201.11990.
        "mt-nlg-530b" => gpt(name, [105, 20480, 81920, 128, 128, 160], 51200),
        // GPT-3: Brown et al., arXiv 2005.14165, table 2.1.
        "gpt-3-175b" => gpt(name, [96, 12288, 49152, 96, 96, 128], 50257),
        // Llama: the `config.json` of each.
        "llama-2-7b" => llama(name, [32, 4096, 11008, 32, 32, 128], 32000, false),
        "llama-2-13b" => llama(name, [40, 5120, 13824, 40, 40, 128], 32000, false),
        "llama-2-70b" => llama(name, [80, 8192, 28672, 64, 8, 128], 32000, false),
        "llama-3-8b" | "llama-3.1-8b" => llama(name, [32, 4096, 14336, 32, 8, 128], 128256, false),
        "llama-3-70b" | "llama-3.1-70b" | "llama-3.3-70b" => llama(name, [80, 8192, 28672, 64, 8, 128], 128256, false),
        "llama-3.1-405b" => llama(name, [126, 16384, 53248, 128, 8, 128], 128256, false),
        "llama-3.2-1b" => llama(name, [16, 2048, 8192, 32, 8, 64], 128256, true),
        "llama-3.2-3b" => llama(name, [28, 3072, 8192, 24, 8, 128], 128256, true),
        // Gemma 2: the `config.json` of each. Its softcaps, windows and second norms change no matrix.
        "gemma-2-2b" => gemma(name, [26, 2304, 9216, 8, 4, 256]),
        "gemma-2-9b" => gemma(name, [42, 3584, 14336, 16, 8, 256]),
        "gemma-2-27b" => gemma(name, [46, 4608, 36864, 32, 16, 128]),
        _ => return Err(ShardError::unknown("model", name, &NAMES)),
    })
}

fn base(name: &str, [layers, model_dim, ff_dim, heads, kv_heads, head_dim]: [usize; 6]) -> Architecture {
    Architecture {
        name: name.to_owned(),
        layers,
        model_dim,
        ff_dim,
        heads,
        kv_heads,
        head_dim,
        vocabulary: 256_128,
        mlp: Mlp::Gated(Nonlinearity::Silu),
        block: Block::Serial,
        norm: Norm::Rms,
        rotary: true,
        tied_embeddings: true,
    }
}

fn palm(name: &str, sizes: [usize; 6]) -> Architecture {
    Architecture { block: Block::Parallel, norm: Norm::Layer, ..base(name, sizes) }
}

fn gpt(name: &str, sizes: [usize; 6], vocabulary: usize) -> Architecture {
    let mlp = Mlp::TwoMatrix(Nonlinearity::Gelu);
    Architecture { vocabulary, mlp, norm: Norm::Layer, rotary: false, ..base(name, sizes) }
}

fn llama(name: &str, sizes: [usize; 6], vocabulary: usize, tied_embeddings: bool) -> Architecture {
    Architecture { vocabulary, tied_embeddings, ..base(name, sizes) }
}

fn gemma(name: &str, sizes: [usize; 6]) -> Architecture {
    Architecture { vocabulary: 256_000, mlp: Mlp::Gated(Nonlinearity::Gelu), ..base(name, sizes) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_name_is_a_sound_model() {
        for name in NAMES {
            let model = by_name(name).unwrap();
            model.validate().unwrap();
            assert_eq!(model.name, name);
        }
    }

    /// Parameters of the Llama and Gemma models as their authors round them.
    #[test]
    fn parameters_are_those_of_the_names() {
        for (name, billions) in [
            ("gpt-3-175b", 174.6),
            ("llama-2-7b", 6.74),
            ("llama-2-13b", 13.02),
            ("llama-2-70b", 68.98),
            ("llama-3-8b", 8.03),
            ("llama-3-70b", 70.55),
            ("llama-3.1-405b", 405.85),
            ("llama-3.2-1b", 1.236),
            ("llama-3.2-3b", 3.213),
            ("gemma-2-2b", 2.614),
            ("gemma-2-9b", 9.242),
            ("gemma-2-27b", 27.227),
        ] {
            let found = by_name(name).unwrap().parameters() as f64 / 1e9;
            assert!((found - billions).abs() < 0.001 * billions, "{name}: {found} B");
        }
    }

    #[test]
    fn an_unknown_name_suggests_the_nearest() {
        let error = by_name("palm-540").unwrap_err().to_string();
        assert!(error.contains("did you mean `palm-540b`?"), "{error}");
        assert!(by_name("zzz").unwrap_err().to_string().ends_with("got `zzz`"));
    }
}
