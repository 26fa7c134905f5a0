//! How attention sits in Burn's autodiff: what is tracked, checkpointing, the log-sum-exp as a second output.

use burn::tensor::{Device, Tensor, TensorData, Tolerance};
use flashover::{AttentionOptions, attention, attention_with_lse};
use flashover_testing::bridge::normal;
use flashover_testing::score::Waves;

use crate::devices;

fn operands(device: &Device) -> [Tensor<4>; 3] {
    let shapes = [(5, [2, 4, 37, 16]), (6, [2, 2, 70, 16]), (7, [2, 2, 70, 24])];
    shapes.map(|(seed, shape)| normal(seed, 1.0, shape, device))
}

fn close(left: TensorData, right: TensorData) {
    left.assert_approx_eq::<f32>(&right, Tolerance::absolute(1e-5));
}

#[test]
fn only_what_is_tracked_gets_a_gradient() {
    for device in devices::native().into_iter().map(Device::autodiff) {
        let all = {
            let [q, k, v] = operands(&device).map(Tensor::require_grad);
            let grads = attention(q.clone(), k.clone(), v.clone(), &AttentionOptions::new()).unwrap().sum().backward();
            [q.grad(&grads), k.grad(&grads), v.grad(&grads)].map(|grad| grad.expect("tracked").into_data())
        };
        for tracked in 0..3 {
            let mut parts = operands(&device);
            parts[tracked] = parts[tracked].clone().require_grad();
            let [q, k, v] = parts.clone();
            let grads = attention(q, k, v, &AttentionOptions::new()).unwrap().sum().backward();
            for (n, part) in parts.iter().enumerate() {
                match part.grad(&grads) {
                    Some(grad) if n == tracked => close(grad.into_data(), all[n].clone()),
                    None if n != tracked => (),
                    other => panic!("operand {n} with {tracked} tracked: {:?}", other.map(|grad| grad.dims())),
                }
            }
        }
    }
}

#[test]
fn an_untracked_call_on_an_autodiff_device_is_plain() {
    let [q, k, v] = operands(&devices::flex().autodiff());
    let tracked = attention(q, k, v, &AttentionOptions::new().causal()).unwrap();
    let [q, k, v] = operands(&devices::flex());
    let plain = attention(q, k, v, &AttentionOptions::new().causal()).unwrap();
    close(tracked.into_data(), plain.into_data());
}

#[test]
fn gradients_reach_through_what_came_before_with_and_without_checkpointing() {
    // Memory-bound operations before attention are recomputed under checkpointing.
    let run = |device: Device| {
        let [q, k, v] = operands(&device).map(Tensor::require_grad);
        let bias = normal(8, 1.0, [1, 4, 1, 70], &device).require_grad();
        let table = normal(9, 1.0, [11], &device).require_grad();
        let options = AttentionOptions::new().causal().bias(bias.clone() * 0.5);
        let options = options.score_function(Waves, table.clone().sin());
        let o = attention(q.clone().cos() * 2.0, k.clone().sin(), v.clone() + 1.0, &options).unwrap();
        let grads = (o.clone() * o.sin()).sum().backward();
        let of = |x: &Tensor<4>| x.grad(&grads).expect("tracked").into_data();
        let of_table = table.grad(&grads).expect("tracked").into_data();
        [of(&q), of(&k), of(&v), of(&bias), of_table]
    };
    let plain = run(devices::flex().autodiff());
    let checkpointed = run(devices::flex().autodiff().gradient_checkpointing());
    for (plain, checkpointed) in plain.into_iter().zip(checkpointed) {
        plain.assert_eq(&checkpointed, true);
    }
}

#[test]
fn both_outputs_can_be_in_one_loss_or_either_alone() {
    for device in devices::native().into_iter().map(Device::autodiff) {
        let run = |with_o: bool, with_lse: bool| {
            let [q, k, v] = operands(&device).map(Tensor::require_grad);
            let (o, lse) = attention_with_lse(q.clone(), k.clone(), v.clone(), &AttentionOptions::new()).unwrap();
            let mut loss = Tensor::<1>::zeros([1], &device);
            if with_o {
                loss = loss + o.sin().sum();
            }
            if with_lse {
                loss = loss + lse.cos().sum();
            }
            let grads = loss.backward();
            [q, k, v].map(|x| x.grad(&grads).map(|grad| grad.inner()))
        };
        let (both, o, lse) = (run(true, true), run(true, false), run(false, true));
        for ((both, o), lse) in both.into_iter().zip(o).zip(lse) {
            let sum = o.expect("tracked") + lse.expect("tracked");
            close(both.expect("tracked").into_data(), sum.into_data());
        }
    }
}

#[test]
fn nothing_differs_between_two_runs() {
    for device in devices::native().into_iter().map(Device::autodiff) {
        let run = || {
            let [q, k, v] = operands(&device).map(Tensor::require_grad);
            let options = AttentionOptions::new().sliding_window(20).visible_sinks(3).dropout(0.3, 11);
            let (o, lse) = attention_with_lse(q.clone(), k.clone(), v.clone(), &options).unwrap();
            let grads = (o.clone().sin().sum() + lse.clone().sum()).backward();
            let mut all = vec![o.into_data(), lse.into_data()];
            all.extend([q, k, v].map(|x| x.grad(&grads).expect("tracked").into_data()));
            all
        };
        for (first, second) in run().into_iter().zip(run()) {
            first.assert_eq(&second, true);
        }
    }
}

#[test]
fn strides_are_read_in_place() {
    for device in devices::native().into_iter().map(Device::autodiff) {
        let [q, k, v] = operands(&device);
        let options = AttentionOptions::new().causal();
        let expected = attention(q.clone(), k.clone(), v.clone(), &options).unwrap().into_data();
        // The same numbers behind swapped dimensions, a slice of something larger, and a flip.
        let swapped = |x: Tensor<4>| {
            let stored = Tensor::<4>::from_data(x.swap_dims(1, 2).into_data(), &device);
            stored.swap_dims(1, 2)
        };
        let sliced = |x: Tensor<4>| {
            let [b, h, s, d] = x.dims();
            let padded = Tensor::cat(vec![Tensor::full([b, h, 3, d], f32::NAN, &device), x], 2);
            padded.slice([0..b, 0..h, 3..s + 3, 0..d])
        };
        for (name, o) in [
            ("swapped", attention(swapped(q.clone()), swapped(k.clone()), swapped(v.clone()), &options)),
            ("sliced", attention(sliced(q.clone()), sliced(k.clone()), sliced(v.clone()), &options)),
            ("flipped", attention(q.flip([0]), k.flip([0]), v.flip([0]), &options).map(|o| o.flip([0]))),
        ] {
            println!("{name}");
            close(o.unwrap().into_data(), expected.clone());
        }
    }
}

#[test]
fn expanded_keys_share_one_head() {
    for device in devices::native().into_iter().map(Device::autodiff) {
        let [q, _, _] = operands(&device);
        let k = normal(8, 1.0, [2, 1, 70, 16], &device).require_grad();
        let v = normal(9, 1.0, [2, 1, 70, 24], &device).require_grad();
        let run = |k4: Tensor<4>, v4: Tensor<4>| {
            let o = attention(q.clone(), k4, v4, &AttentionOptions::new()).unwrap();
            let grads = o.clone().sin().sum().backward();
            [o.into_data(), k.grad(&grads).expect("tracked").into_data(), v.grad(&grads).expect("tracked").into_data()]
        };
        let grouped = run(k.clone(), v.clone());
        let expanded = run(k.clone().expand([2, 4, 70, 16]), v.clone().expand([2, 4, 70, 24]));
        for (grouped, expanded) in grouped.into_iter().zip(expanded) {
            grouped.assert_approx_eq::<f32>(&expanded, Tolerance::absolute(5e-5));
        }
    }
}
