//! Work over the heads of a problem on all cores.

use std::sync::atomic::{AtomicUsize, Ordering};

use flashover_kernels::problem::Problem;

/// Products of a head below which starting threads takes longer than the work.
const WORTH_A_THREAD: usize = 100_000;

/// The results of `work(index)` for every query head of the problem, `index = b · Hq + h`, in that order.
pub(crate) fn map_heads<R: Send>(problem: &Problem, work: impl Fn(usize) -> R + Sync) -> Vec<R> {
    let n = problem.batch * problem.heads_q;
    if problem.seq_q * problem.seq_kv * problem.head_dim < WORTH_A_THREAD {
        return (0..n).map(work).collect();
    }
    parallel_map(n, work)
}

/// `[work(0), …, work(n − 1)]`, computed by as many threads as there are cores.
fn parallel_map<R: Send>(n: usize, work: impl Fn(usize) -> R + Sync) -> Vec<R> {
    let workers = std::thread::available_parallelism().map_or(1, |cores| cores.get()).min(n);
    let next = AtomicUsize::new(0);
    let take = || {
        let mut done = Vec::new();
        loop {
            let index = next.fetch_add(1, Ordering::Relaxed);
            if index >= n {
                return done;
            }
            done.push((index, work(index)));
        }
    };
    let mut results: Vec<(usize, R)> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..workers).map(|_| scope.spawn(take)).collect();
        threads.into_iter().flat_map(|thread| thread.join().expect("a worker panicked")).collect()
    });
    // Callers sum over heads: one order whatever the threads did.
    results.sort_by_key(|&(index, _)| index);
    results.into_iter().map(|(_, result)| result).collect()
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
