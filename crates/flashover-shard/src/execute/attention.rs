//! Attention on a rank, over the keys that it holds: the cache that grows, and partial softmaxes merged by their
//! log-sum-exps.

use burn::tensor::{Int, Tensor, TensorData};
use flashover::{AttentionOptions, attention, attention_with_lse};

use super::Rank;
use super::state::{Cache, grow, is_spread};
use crate::error::ShardError;
use crate::program::{Role, TensorId};
use crate::spec::Dim;
use crate::transport::Transport;

impl<T: Transport> Rank<'_, T> {
    /// Adds the tokens that are this rank's to its part of the cache.
    pub(super) fn append(&mut self, new: TensorId, cache: TensorId) -> Result<(), ShardError> {
        let x = self.get(new)?;
        let (name, spec) = (self.pass.program.tensor(cache).name, self.pass.spec(cache).clone());
        let spread = is_spread(self.pass.spec(new), &spec);
        let block = self.owner[cache];
        let old = self.state.cache(name, self.layer);
        if let Some(old) = old.filter(|old| old.spec != spec) {
            return Err(ShardError::field(format!("rank {}: {name}", self.rank), old.spec.to_string(), spec));
        }
        let mut positions = match old {
            Some(old) => old.positions.clone(),
            None => vec![Vec::new(); self.pass.mesh.group_size(spec.axes(Dim::M))?],
        };
        let held = positions.iter().map(Vec::len).sum::<usize>();
        if held != self.pass.past {
            let field = format!("rank {}: {name}", self.rank);
            return Err(ShardError::field(field, format!("{} tokens", self.pass.past), held));
        }
        let mine = if spread {
            let count = positions.len();
            let local = (0..x.dims()[1]).filter(|l| (self.pass.past + l) % count == block);
            local.map(|l| x.clone().narrow(1, l, 1)).collect()
        } else {
            vec![x.clone()]
        };
        grow(&mut positions, self.pass.past, self.pass.sizes.get(Dim::L), spread);
        let old = old.map(|old| old.tensor.clone());
        let parts: Vec<_> = old.into_iter().chain(mine).filter(|part| part.dims()[1] > 0).collect();
        let tensor = match parts.len() {
            // A part of the cache that no token has come to yet.
            0 => Tensor::zeros([x.dims()[0], 0, x.dims()[2], x.dims()[3]], (&self.device, x.dtype())),
            _ => Tensor::cat(parts, 1),
        };
        self.check(cache, &tensor)?;
        self.state.set_cache(name, self.layer, Cache { spec, tensor, positions });
        Ok(())
    }

    /// Causal attention of the rank's queries over the keys at hand.
    pub(super) fn attention(
        &mut self,
        [q, k, v, output]: [TensorId; 4],
        lse: Option<TensorId>,
    ) -> Result<(), ShardError> {
        let [queries, keys, values] = [self.get(q)?, self.get(k)?, self.get(v)?];
        let [batch, length, heads, _] = queries.dims();
        let first = self.pass.past + self.pass.starts[q][self.rank][1];
        let Seen { count, causal } = self.seen(k, first, length)?;
        let (o, sums) = if count == 0 {
            let like = (&self.device, queries.dtype());
            let sums = Tensor::full([batch, length, heads, 1], f32::NEG_INFINITY, like);
            (Tensor::zeros(queries.dims(), like), Some(sums))
        } else {
            let local = |x: Tensor<4>| {
                let x = if count < x.dims()[1] { x.narrow(1, 0, count) } else { x };
                self.heads(x.swap_dims(1, 2), q, k)
            };
            let (queries, keys, values) = (queries.swap_dims(1, 2), local(keys), local(values));
            let options = if causal { AttentionOptions::new().causal() } else { AttentionOptions::new() };
            let refused = |error| ShardError::Attention { rank: self.rank, error };
            if lse.is_some() {
                let (o, sums) = attention_with_lse(queries, keys, values, &options).map_err(refused)?;
                (o.swap_dims(1, 2), Some(sums.swap_dims(1, 2).reshape([batch, length, heads, 1])))
            } else {
                (attention(queries, keys, values, &options).map_err(refused)?.swap_dims(1, 2), None)
            }
        };
        self.put(output, o)?;
        lse.zip(sums).map_or(Ok(()), |(lse, sums)| self.put(lse, sums))
    }

    /// Which of the keys the queries at positions `first .. first + length` see.
    fn seen(&self, k: TensorId, first: usize, length: usize) -> Result<Seen, ShardError> {
        // A ring passes copies on; their positions are those of the cache that they come from. Keys and values agree.
        let of_cache = self.pass.program.of_role(Role::Cache).next();
        let name = of_cache.map_or("cache", |(_, tensor)| tensor.name);
        let cache = self.state.cache(name, self.layer).ok_or_else(|| ShardError::field(name, "a cache", "none"))?;
        let positions = &cache.positions[self.owner[k]];
        let see: Vec<usize> = (first..first + length).map(|at| positions.partition_point(|&m| m <= at)).collect();
        let count = see[length - 1];
        let causal = see[0] != count;
        if causal && !see.iter().enumerate().all(|(i, &n)| n + length == count + 1 + i) {
            // No program makes such keys: new tokens are consecutive, and all others came before them.
            return Err(ShardError::field(format!("rank {}: {name}", self.rank), "keys in causal order", "gaps"));
        }
        Ok(Seen { count, causal })
    }

    /// The key heads `[B, K, M, Q]` that the rank's query heads read, so that they fall into equal groups.
    fn heads(&self, x: Tensor<4>, q: TensorId, k: TensorId) -> Tensor<4> {
        let (sizes, starts) = (self.pass.sizes, &self.pass.starts);
        let group = sizes.get(Dim::H) / sizes.get(Dim::K);
        let (first, held) = (starts[q][self.rank][2], starts[k][self.rank][2]);
        let count = self.pass.shapes[q][2];
        let of: Vec<usize> = (first..first + count).map(|h| h / group - held).collect();
        let distinct = of[count - 1] - of[0] + 1;
        let even = count.is_multiple_of(distinct)
            && of.iter().enumerate().all(|(h, &head)| head == of[0] + h / (count / distinct));
        if !even {
            // Groups that a block of query heads cuts through: each query head gets its own copy.
            let index: Vec<i32> = of.iter().map(|&head| head as i32).collect();
            let index = Tensor::<1, Int>::from_data(TensorData::new(index, [count]), &self.device);
            x.select(1, index)
        } else if distinct < x.dims()[1] {
            x.narrow(1, of[0], distinct)
        } else {
            x
        }
    }

    /// Two results of attention over disjoint keys as one.
    pub(super) fn merge(
        &mut self,
        a: (TensorId, TensorId),
        b: (TensorId, TensorId),
        output: (TensorId, TensorId),
    ) -> Result<(), ShardError> {
        let [(o_a, lse_a), (o_b, lse_b)] = [(self.get(a.0)?, self.get(a.1)?), (self.get(b.0)?, self.get(b.1)?)];
        let (o, lse) = merged((o_a, lse_a), (o_b, lse_b));
        self.put(output.0, o)?;
        self.put(output.1, lse)
    }

    /// A rank's share in a merge over ranks.
    pub(super) fn rescale(
        &mut self,
        [o, lse, max]: [TensorId; 3],
        [output, weight]: [TensorId; 2],
    ) -> Result<(), ShardError> {
        let (scaled, w) = rescaled(self.get(o)?, self.get(lse)?, self.get(max)?);
        self.put(output, scaled)?;
        self.put(weight, w)
    }

    pub(super) fn divide(&mut self, o: TensorId, weight: TensorId, output: TensorId) -> Result<(), ShardError> {
        let whole = divided(self.get(o)?, self.get(weight)?);
        self.put(output, whole)
    }
}

/// Keys that a block of queries sees: the first `count` that the rank holds, all queries all of them or in causal order.
struct Seen {
    count: usize,
    causal: bool,
}

/// Results `(o, lse)` over disjoint keys as one; where both have seen nothing, 0 and `−∞`.
fn merged((o_a, lse_a): (Tensor<4>, Tensor<4>), (o_b, lse_b): (Tensor<4>, Tensor<4>)) -> (Tensor<4>, Tensor<4>) {
    let max = finite(lse_a.clone().max_pair(lse_b.clone()));
    let (w_a, w_b) = ((lse_a - max.clone()).exp(), (lse_b - max.clone()).exp());
    let sum = w_a.clone() + w_b.clone();
    // The logarithm of zero is −∞: a row that saw nothing still has seen nothing.
    (divided(o_a * w_a + o_b * w_b, sum.clone()), max + sum.log())
}

/// `o` with its weight `e^(lse − max)`, and the weight; both 0 where nobody has seen anything.
fn rescaled(o: Tensor<4>, lse: Tensor<4>, max: Tensor<4>) -> (Tensor<4>, Tensor<4>) {
    let weight = (lse - finite(max)).exp();
    (o * weight.clone(), weight)
}

/// `−∞` replaced by 0, so that a difference to it is `−∞` and not NaN.
fn finite(x: Tensor<4>) -> Tensor<4> {
    let none = x.clone().equal_scalar(f32::NEG_INFINITY);
    x.mask_fill(none, 0.0)
}

/// `o / weight`, and 0 where the weight is 0.
fn divided(o: Tensor<4>, weight: Tensor<4>) -> Tensor<4> {
    let none = weight.clone().equal_scalar(0.0_f32);
    o / weight.mask_fill(none, 1.0)
}

#[cfg(test)]
mod tests {
    use burn::tensor::Device;

    use super::*;

    fn rows(values: [f32; 4]) -> Tensor<4> {
        Tensor::from_data(TensorData::new(values.to_vec(), [1, 4, 1, 1]), &Device::flex())
    }

    fn close(found: Tensor<4>, expected: [f32; 4]) {
        for (found, expected) in found.into_data().iter::<f32>().zip(expected) {
            assert!(found == expected || (found - expected).abs() < 1e-6, "{found}, not {expected}");
        }
    }

    const NONE: f32 = f32::NEG_INFINITY;

    /// No program of these layouts merges two rows that have seen nothing; the steps say what comes of it.
    #[test]
    fn rows_that_see_nothing_merge_to_nothing() {
        let (a, b) = (rows([NONE, NONE, 1.0, 0.0]), rows([NONE, 2.0, NONE, 0.0]));
        let (o, lse) = merged((rows([0.0, 0.0, 3.0, 1.0]), a.clone()), (rows([0.0, 5.0, 0.0, 2.0]), b.clone()));
        close(o, [0.0, 5.0, 3.0, 1.5]);
        close(lse, [NONE, 2.0, 1.0, 2.0_f32.ln()]);
        let (o, weight) = rescaled(rows([0.0, 0.0, 3.0, 1.0]), a.clone(), a.max_pair(b));
        close(o.clone(), [0.0, 0.0, 3.0, 1.0]);
        close(weight.clone(), [0.0, 0.0, 1.0, 1.0]);
        close(divided(o, weight), [0.0, 0.0, 3.0, 1.0]);
    }
}
