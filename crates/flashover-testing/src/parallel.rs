//! Work over the heads of a problem on all cores.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicUsize, Ordering};

use flashover_kernels::problem::Problem;

/// Products of a head below which starting threads takes longer than the work.
const WORTH_A_THREAD: usize = 100_000;

/// The results of `work(index)` for every query head of the problem, `index = b · Hq + h`, in that order.
pub(crate) fn map_heads<R: Send + Sync>(problem: &Problem, work: impl Fn(usize) -> R + Sync) -> Vec<R> {
    let n = problem.batch * problem.heads_q;
    if problem.seq_q * problem.seq_kv * problem.head_dim < WORTH_A_THREAD {
        return (0..n).map(work).collect();
    }
    parallel_map(n, work)
}

/// `[work(0), …, work(n − 1)]`, computed by as many threads as there are cores.
fn parallel_map<R: Send + Sync>(n: usize, work: impl Fn(usize) -> R + Sync) -> Vec<R> {
    let workers = std::thread::available_parallelism().map_or(1, |cores| cores.get()).min(n);
    let next = AtomicUsize::new(0);
    // A place for each result: callers sum over heads, in one order whatever the threads did.
    let results: Vec<OnceLock<R>> = (0..n).map(|_| OnceLock::new()).collect();
    std::thread::scope(|scope| {
        for _ in 0..workers {
            scope.spawn(|| {
                loop {
                    let index = next.fetch_add(1, Ordering::Relaxed);
                    let Some(result) = results.get(index) else { break };
                    result.get_or_init(|| work(index));
                }
            });
        }
    });
    results.into_iter().map(|result| result.into_inner().expect("every place was taken")).collect()
}

#[cfg(test)]
mod tests {
    use super::parallel_map;

    #[test]
    fn results_come_in_order() {
        assert_eq!(parallel_map(100, |i| i * i), (0..100).map(|i| i * i).collect::<Vec<_>>());
        assert!(parallel_map(0, |i| i).is_empty());
    }
}
