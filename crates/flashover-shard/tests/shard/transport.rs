//! The simulated transport by itself: what each collective gives, what it counts, and what happens when a rank fails.

use burn::tensor::{Device, Tensor, TensorData};
use flashover_shard::ShardError;
use flashover_shard::mesh::{Axis, Mesh};
use flashover_shard::transport::{Reduction, Simulated, Traffic, Transport};

const X: Axis = Axis::X;
const Y: Axis = Axis::Y;
const Z: Axis = Axis::Z;

fn tensor(values: &[f32]) -> Tensor<4> {
    Tensor::from_data(TensorData::new(values.to_vec(), [1, 1, 1, values.len()]), &Device::flex())
}

fn values(tensor: &Tensor<4>) -> Vec<f32> {
    tensor.to_data().iter::<f32>().collect()
}

/// What every rank of a 2×3×2 mesh makes of its end, with the bytes that it moved.
fn each<R: Send>(run: impl Fn(&mut Simulated) -> R + Sync) -> Vec<(R, Traffic)> {
    let mesh = Mesh::torus(2, 3, 2).unwrap();
    std::thread::scope(|scope| {
        let start = |mut end: Simulated| {
            let run = &run;
            scope.spawn(move || {
                let made = run(&mut end);
                (made, end.traffic())
            })
        };
        let threads: Vec<_> = Simulated::ends(&mesh).into_iter().map(start).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

fn traffic(payload: u64, sent: u64) -> Traffic {
    Traffic { payload, sent, received: sent }
}

#[test]
fn an_all_gather_gives_every_tensor_in_the_groups_order() {
    let found = each(|end| {
        let all = end.all_gather(&[Z, Y], tensor(&[end.rank() as f32; 2])).unwrap();
        all.iter().map(|tensor| values(tensor)[0]).collect::<Vec<_>>()
    });
    // Ranks are digits x, y, z: z counts most in a group over zy.
    assert_eq!(found[0].0, [0.0, 2.0, 4.0, 1.0, 3.0, 5.0]);
    assert_eq!(found[7].0, [6.0, 8.0, 10.0, 7.0, 9.0, 11.0]);
    // Six tensors of two f32, five of them from elsewhere.
    assert!(found.iter().all(|(_, moved)| *moved == traffic(48, 40)));
}

#[test]
fn a_reduce_scatter_gives_a_rank_the_sum_of_its_pieces() {
    let found = each(|end| {
        let rank = end.rank() as f32;
        let pieces = (0..3).map(|i| tensor(&[rank + 100.0 * i as f32])).collect();
        values(&end.reduce_scatter(&[Y], pieces).unwrap())[0]
    });
    // Rank 3 is (0, 1, 1); its group over y is 1, 3, 5.
    assert_eq!(found[3].0, 9.0 + 300.0);
    assert!(found.iter().all(|(_, moved)| *moved == traffic(12, 8)));
}

#[test]
fn an_all_reduce_is_the_same_on_every_rank() {
    let part = |rank: usize, i: usize| 1.0 / (1 + rank * 7 + i) as f32;
    let sums = each(|end| {
        let mine: Vec<f32> = (0..7).map(|i| part(end.rank(), i)).collect();
        values(&end.all_reduce(&[X, Y, Z], tensor(&mine), Reduction::Sum).unwrap())
    });
    for (i, &sum) in sums[0].0.iter().enumerate() {
        let expected: f32 = (0..12).map(|rank| part(rank, i)).sum();
        assert!((sum - expected).abs() < 1e-6, "{sum} {expected}");
    }
    assert!(sums.iter().all(|(sum, _)| *sum == sums[0].0));
    // 7 elements in and out; on the wire 12 pieces of one, 5 of them filling: 11 there and 11 back.
    assert!(sums.iter().all(|(_, moved)| *moved == traffic(2 * 28, 2 * 11 * 4)));
    let most = each(|end| {
        let mine = [end.rank() as f32, f32::NEG_INFINITY];
        values(&end.all_reduce(&[X, Z], tensor(&mine), Reduction::Max).unwrap())
    });
    assert_eq!(most[0].0, [7.0, f32::NEG_INFINITY]);
}

#[test]
fn an_all_to_all_transposes() {
    let found = each(|end| {
        let pieces = (0..2).map(|to| tensor(&[(10 * end.rank() + to) as f32])).collect();
        let all = end.all_to_all(&[X], pieces).unwrap();
        all.iter().map(|tensor| values(tensor)[0]).collect::<Vec<_>>()
    });
    assert_eq!(found[2].0, [20.0, 80.0]);
    assert_eq!(found[8].0, [21.0, 81.0]);
    assert!(found.iter().all(|(_, moved)| *moved == traffic(8, 4)));
}

#[test]
fn a_send_goes_round() {
    let found = each(|end| values(&end.send_receive(&[Y], tensor(&[end.rank() as f32])).unwrap())[0]);
    assert_eq!((found[1].0, found[3].0, found[5].0), (5.0, 1.0, 3.0));
    assert!(found.iter().all(|(_, moved)| *moved == traffic(4, 4)));
}

#[test]
fn a_broadcast_reaches_everyone() {
    let found = each(|end| {
        let root = end.rank() % 2 == 1;
        let tensor = root.then(|| tensor(&[end.rank() as f32]));
        values(&end.broadcast(&[Z], 1, tensor).unwrap())[0]
    });
    assert_eq!((found[0].0, found[1].0, found[6].0), (1.0, 1.0, 7.0));
    assert_eq!(found[1].1, Traffic { payload: 4, sent: 4, received: 0 });
    assert_eq!(found[0].1, Traffic { payload: 4, sent: 0, received: 4 });
}

#[test]
fn a_group_of_one_moves_nothing() {
    let found = each(|end| {
        let x = end.all_reduce(&[], tensor(&[1.0]), Reduction::Sum).unwrap();
        values(&end.all_gather(&[], x).unwrap()[0])[0]
    });
    assert!(found.iter().all(|&(value, moved)| value == 1.0 && moved == Traffic::default()));
}

#[test]
fn a_rank_that_stops_leaves_no_one_waiting() {
    let found = each(|end| {
        if end.rank() == 2 {
            return None;
        }
        Some(end.all_reduce(&[Y], tensor(&[1.0]), Reduction::Sum).map(|x| values(&x)))
    });
    assert_eq!(found[0].0, Some(Err(ShardError::Stopped { rank: 0, peer: 2 })));
    assert_eq!(found[1].0, Some(Ok(vec![3.0])));
}

#[test]
fn tensors_that_do_not_belong_together_are_refused() {
    let message = |found: Result<Vec<f32>, ShardError>| found.unwrap_err().to_string();
    let found = each(|end| {
        let mine = vec![1.0; 1 + end.rank() / 6];
        end.all_gather(&[X], tensor(&mine)).map(|all| values(&all[0]))
    });
    assert_eq!(message(found[0].0.clone()), "rank 0: tensor of rank 6: expected [1, 1, 1, 1], got [1, 1, 1, 2]");
    let found = each(|end| end.all_to_all(&[X], vec![tensor(&[1.0])]).map(|all| values(&all[0])));
    assert_eq!(message(found[4].0.clone()), "rank 4: pieces: expected 2 of a group, got 1");
    let found = each(|end| end.broadcast(&[Y], 3, None).map(|x| values(&x)));
    assert_eq!(message(found[0].0.clone()), "root: expected below 3, got 3");
    let found =
        each(|end| end.all_gather(&["w".parse::<char>().unwrap().try_into().unwrap()], tensor(&[1.0])).map(drop));
    assert!(matches!(found[0].0, Err(ShardError::UnknownAxis { .. })));
}
