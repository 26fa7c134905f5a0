//! Text from a model.

use burn::tensor::{Device, Distribution, Int, Tensor, TensorData};

use crate::Result;
use crate::model::ByteModel;

/// `count` bytes that the model writes after `prompt`, drawn from its distribution at `temperature`; `seed` decides
/// which.
///
/// # Errors
///
/// If the device fails.
pub fn sample(
    model: &ByteModel,
    prompt: &str,
    count: usize,
    temperature: f64,
    seed: u64,
    device: &Device,
) -> Result<String> {
    device.seed(seed);
    let mut memory = model.new_memory();
    // A model needs one byte to start from.
    let mut new: Vec<u8> = if prompt.is_empty() { vec![b'\n'] } else { prompt.as_bytes().to_vec() };
    let mut text = Vec::with_capacity(count);
    while text.len() < count {
        let length = new.len();
        let data = TensorData::new(new.iter().map(|byte| i32::from(*byte)).collect(), [1, length]);
        let logits = model.forward_next(Tensor::<2, Int>::from_data(data, device), &mut memory);
        let logits = logits.narrow(1, length - 1, 1);
        // argmax(logits / T + Gumbel noise) is a draw from softmax(logits / T).
        let uniform = Tensor::random(logits.dims(), Distribution::Uniform(1e-6, 1.0 - 1e-6), device);
        let gumbel: Tensor<3> = -(-uniform.log()).log();
        let next = u8::try_from((logits / temperature + gumbel).argmax(2).try_into_scalar::<i64>()?)?;
        text.push(next);
        new = vec![next];
    }
    Ok(printable(&text))
}

/// Control characters, which could disturb a terminal, become `·`.
fn printable(bytes: &[u8]) -> String {
    let keep = |c: char| if c.is_control() && c != '\n' && c != '\t' { '·' } else { c };
    String::from_utf8_lossy(bytes).chars().map(keep).collect()
}
