//! Dropout as a pure function of `(seed, b, h, i, j)`: no state, no mask in memory, and the same decision on every
//! backend, for every tile size, forward and backward.
//!
//! Two rounds of a 32-bit mixer with full avalanche over the row (`b·Hq + h`, `i`), which is hashed once a row, and
//! one over the key. The mixer is the integer hash of Wellons' prospector with the lowest measured bias among
//! two-multiplication constants (`lowbias32`).

use cubecl::prelude::*;
use serde::{Deserialize, Serialize};

use crate::problem::ProblemError;

/// Dropout of attention probabilities: each is zeroed with `probability`, the others grow by `1/(1 − probability)`.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Dropout {
    /// Probability of dropping, in `[0, 1)`.
    pub probability: f64,
    /// Seed of the pattern.
    pub seed: u64,
}

impl Dropout {
    pub(crate) fn validate(&self) -> Result<(), ProblemError> {
        if (0.0..1.0).contains(&self.probability) {
            Ok(())
        } else {
            Err(ProblemError::Dropout { found: self.probability })
        }
    }

    /// A probability is kept when its hash is at least this.
    pub fn threshold(&self) -> u32 {
        (self.probability * 4_294_967_296.0) as u32
    }

    /// Factor of the probabilities that are kept.
    pub fn factor(&self) -> f64 {
        1.0 / (1.0 - self.probability)
    }

    /// The two halves of the seed, low first, as kernels take them.
    pub fn seed_words(&self) -> (u32, u32) {
        (self.seed as u32, (self.seed >> 32) as u32)
    }

    /// Factor of the probability of key `j` for query `i` of head `h` of batch element `b`, out of `heads` heads:
    /// 0 or [`factor`](Self::factor).
    pub fn multiplier(&self, b: u32, h: u32, heads: u32, i: u32, j: u32) -> f64 {
        let (low, high) = self.seed_words();
        let row = dropout_row(low, high, b * heads + h, i);
        if dropout_keeps(row, j, self.threshold()) { self.factor() } else { 0.0 }
    }
}

/// Hash of a query row; `head` counts over the batch, `b·Hq + h`.
#[cube]
pub fn dropout_row(seed_low: u32, seed_high: u32, head: u32, i: u32) -> u32 {
    let h = mix(head ^ seed_low);
    mix(mix(h ^ i) ^ seed_high)
}

/// Whether key `j` survives in a row hashed by [`dropout_row()`].
#[cube]
pub fn dropout_keeps(row: u32, j: u32, threshold: u32) -> bool {
    mix(row ^ mix(j ^ 2654435769u32)) >= threshold
}

/// A bijection of u32 with full avalanche.
#[cube]
pub fn mix(x: u32) -> u32 {
    let x = wrapping_mul(x ^ (x >> 16u32), 2146121005u32);
    let x = wrapping_mul(x ^ (x >> 15u32), 2221713035u32);
    x ^ (x >> 16u32)
}

/// `a · b` modulo 2³²: CubeCL has no such function, its `*` wraps on devices and panics on a checked host.
pub fn wrapping_mul(a: u32, b: u32) -> u32 {
    a.wrapping_mul(b)
}

/// What [`wrapping_mul`](fn@wrapping_mul) becomes inside a kernel.
pub mod wrapping_mul {
    use super::*;

    /// Records the product; devices wrap.
    pub fn expand(scope: &Scope, a: NativeExpand<u32>, b: NativeExpand<u32>) -> NativeExpand<u32> {
        device_mul::expand(scope, a, b)
    }
}

#[cube]
fn device_mul(a: u32, b: u32) -> u32 {
    a * b
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kept_share_is_the_probability() {
        for probability in [0.0, 0.1, 0.5, 0.9] {
            let dropout = Dropout { probability, seed: 7 };
            let n = 200_000u32;
            let kept = (0..n).filter(|&x| dropout.multiplier(x % 3, x % 5, 5, x / 400, x % 400) > 0.0).count() as f64;
            let sigma = (probability * (1.0 - probability) * f64::from(n)).sqrt();
            assert!((kept - f64::from(n) * (1.0 - probability)).abs() <= 5.0 * sigma + 0.5, "{probability}: {kept}");
        }
    }

    #[test]
    fn rows_keys_heads_and_seeds_decide_independently() {
        let keeps = |seed, b, h, i, j| Dropout { probability: 0.5, seed }.multiplier(b, h, 8, i, j) > 0.0;
        let agree = |f: &dyn Fn(u32, u32) -> (bool, bool)| {
            let pairs = (0..100).flat_map(|i| (0..100).map(move |j| (i, j)));
            pairs
                .filter(|&(i, j)| {
                    let (x, y) = f(i, j);
                    x == y
                })
                .count()
        };
        for (name, count) in [
            ("seed", agree(&|i, j| (keeps(1, 0, 0, i, j), keeps(2, 0, 0, i, j)))),
            ("high seed", agree(&|i, j| (keeps(1, 0, 0, i, j), keeps(1 << 40 | 1, 0, 0, i, j)))),
            ("batch", agree(&|i, j| (keeps(1, 0, 0, i, j), keeps(1, 1, 0, i, j)))),
            ("head", agree(&|i, j| (keeps(1, 0, 0, i, j), keeps(1, 0, 1, i, j)))),
            ("row", agree(&|i, j| (keeps(1, 0, 0, i, j), keeps(1, 0, 0, i + 1, j)))),
            ("key", agree(&|i, j| (keeps(1, 0, 0, i, j), keeps(1, 0, 0, i, j + 1)))),
        ] {
            assert!((4750..5250).contains(&count), "{name}: {count} of 10000 agree");
        }
    }
}
