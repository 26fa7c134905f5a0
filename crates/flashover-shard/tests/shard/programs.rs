//! Every layout's program is sound on every mesh that it accepts, and not by accident: change one spec and it is refused.

use flashover_shard::architecture::{Architecture, Block, Mlp, Nonlinearity, Norm};
use flashover_shard::layout::{Layout, LayoutOptions, WeightLayout};
use flashover_shard::mesh::{Axis, Mesh};
use flashover_shard::program::Program;
use flashover_shard::spec::{Sizes, Spec};
use flashover_shard::workload::Workload;
use flashover_shard::{ShardError, models};

/// A small model whose dimensions every mesh of up to 16 chips divides.
fn small(heads: usize, kv_heads: usize, block: Block, mlp: Mlp) -> Architecture {
    Architecture {
        name: "small".into(),
        layers: 2,
        model_dim: 48,
        ff_dim: 96,
        heads,
        kv_heads,
        head_dim: 4,
        vocabulary: 50,
        mlp,
        block,
        norm: Norm::Rms,
        rotary: true,
        tied_embeddings: false,
    }
}

fn architectures() -> Vec<Architecture> {
    let mut all = Vec::new();
    for (heads, kv_heads) in [(8, 8), (8, 2), (8, 1), (6, 6), (6, 3), (3, 1)] {
        for block in [Block::Serial, Block::Parallel] {
            for mlp in [Mlp::TwoMatrix(Nonlinearity::Relu), Mlp::Gated(Nonlinearity::Silu)] {
                all.push(small(heads, kv_heads, block, mlp));
            }
        }
    }
    all
}

fn workloads() -> [Workload; 2] {
    [Workload { scored: 16, ..Workload::prefill(16, 16) }, Workload::decode(16, 32)]
}

/// Calls `check` with every program of every small model on every mesh; gives their number.
fn every_program(chips: &[usize], mut check: impl FnMut(&str, &Program, &Mesh, &Sizes)) -> usize {
    let mut programs = 0;
    for model in architectures() {
        for mesh in chips.iter().flat_map(|&n| Mesh::factorizations(n)) {
            for workload in workloads() {
                for layout in Layout::all() {
                    for fused in [true, false] {
                        let options = LayoutOptions { fused, ..LayoutOptions::default() };
                        let name = format!("{layout} {} {:?} {mesh}", workload.phase, model);
                        match layout.program(&model, &mesh, &workload, options) {
                            Ok((program, sizes)) => {
                                check(&name, &program, &mesh, &sizes);
                                programs += 1;
                            }
                            // One token cannot be sharded.
                            Err(ShardError::Field { field, .. }) if field == "layout" && workload.tokens == 1 => {}
                            Err(error) => panic!("{name}: {error}"),
                        }
                    }
                }
            }
        }
    }
    programs
}

#[test]
fn every_layout_is_a_valid_program() {
    let programs = every_program(&[1, 2, 4, 8, 16], |name, program, _, _| {
        program.validate().unwrap_or_else(|error| panic!("{name}: {error}"));
    });
    assert!(programs > 20_000, "{programs}");
}

/// Corruptions of a spec: an axis dropped, moved to the front, put on another dimension, or a sum forgotten or invented.
fn corruptions(spec: &Spec) -> Vec<Spec> {
    let axes = [Axis::X, Axis::Y, Axis::Z];
    let mut all = Vec::new();
    for d in spec.dims() {
        for i in 0..d.axes.len() {
            let mut less = d.axes.clone();
            let axis = less.remove(i);
            all.push(spec.with(d.dim, &less));
            for other in spec.dims().iter().filter(|other| other.dim != d.dim) {
                let moved = [&other.axes[..], &[axis]].concat();
                all.push(spec.with(d.dim, &less).and_then(|spec| spec.with(other.dim, &moved)));
            }
            less.insert(0, axis);
            all.push(spec.with(d.dim, &less));
        }
        for axis in axes {
            all.push(spec.with(d.dim, &[&d.axes[..], &[axis]].concat()));
        }
    }
    for axis in axes {
        let less: Vec<_> = spec.partial().iter().copied().filter(|&other| other != axis).collect();
        all.push(spec.with_partial(&less));
        all.push(spec.with_partial(&[spec.partial(), &[axis]].concat()));
    }
    all.into_iter().flatten().filter(|changed| changed != spec).collect()
}

/// What a program shares with others: weights as they are stored, and the logits. Steps alone do not tell how a weight
/// lies that is gathered before it is used, so these specs are typed in, for a 2×2×2 mesh. Other tensors always pass.
fn stored(weights: WeightLayout, kv_heads: usize, name: &str, spec: &Spec) -> bool {
    let one = weights == WeightLayout::Stationary1D;
    let expected = match (name, one) {
        ("up.weight" | "gate.weight", true) => "EF_zyx",
        ("up.weight" | "gate.weight", false) => "E_xF_zy",
        ("down.weight", true) => "F_zyxE",
        ("down.weight", false) => "F_zyE_x",
        ("q.weight", true) => "EH_zyxQ",
        ("q.weight", false) => "E_xH_zyQ",
        ("o.weight", true) => "H_zyxQE",
        ("o.weight", false) => "H_zyQE_x",
        ("k.weight" | "v.weight", _) => match (kv_heads, one) {
            (1, true) => "E_zyxKQ",
            (1, false) => "E_xzyKQ",
            (2, true) => "E_yxK_zQ",
            (2, false) => "E_xyK_zQ",
            (_, true) => "EK_zyxQ",
            (_, false) => "E_xK_zyQ",
        },
        ("embedding" | "unembedding", true) => "V_zyxE",
        ("embedding" | "unembedding", false) => "V_zyE_x",
        ("norm.scale" | "mlp.norm.scale" | "head.norm.scale", _) => "E",
        ("logits", _) => "BTV_zyx",
        _ => return true,
    };
    spec.to_string() == expected
}

#[test]
fn corrupting_one_spec_makes_a_program_invalid() {
    let mesh = Mesh::torus(2, 2, 2).unwrap();
    let mut corrupted = 0;
    for model in [
        small(8, 2, Block::Serial, Mlp::Gated(Nonlinearity::Silu)),
        small(8, 1, Block::Parallel, Mlp::Gated(Nonlinearity::Silu)),
        small(8, 8, Block::Parallel, Mlp::TwoMatrix(Nonlinearity::Gelu)),
    ] {
        for workload in workloads() {
            for layout in Layout::all() {
                let Ok((program, _)) = layout.program(&model, &mesh, &workload, LayoutOptions::default()) else {
                    continue;
                };
                for tensor in &program.tensors {
                    assert!(stored(layout.weights, model.kv_heads, tensor.name, &tensor.spec), "{}", tensor.name);
                }
                for id in 0..program.tensors.len() {
                    for spec in corruptions(&program.tensor(id).spec) {
                        let mut broken = program.clone();
                        broken.tensors[id].spec = spec.clone();
                        let name = program.tensor(id).name;
                        let was = &program.tensor(id).spec;
                        let caught = broken.validate().is_err() || !stored(layout.weights, model.kv_heads, name, &spec);
                        assert!(caught, "{layout} {workload:?}: {name} {was} as {spec} is accepted");
                        corrupted += 1;
                    }
                }
            }
        }
    }
    assert!(corrupted > 50_000, "{corrupted}");
}

/// §3.2 and A.2: weights lie alike under 2D weight-stationary and every weight-gathered layout, in both phases; caches of
/// batch-sharded attention lie alike under all layouts.
#[test]
fn weights_and_caches_are_shared_between_phases() {
    let mesh = Mesh::torus(2, 2, 2).unwrap();
    for model in architectures() {
        let mut stored: Option<Vec<(String, String)>> = None;
        let mut cached: Option<String> = None;
        for layout in Layout::all().filter(|layout| layout.weights.name() != "1d-weight-stationary") {
            for workload in workloads() {
                let options = LayoutOptions { heads_multiple: 8, ..LayoutOptions::default() };
                let Ok((program, _)) = layout.program(&model, &mesh, &workload, options) else { continue };
                let mut weights: Vec<_> = program
                    .of_role(flashover_shard::program::Role::Weight)
                    .map(|(_, tensor)| (tensor.name.to_owned(), tensor.spec.to_string()))
                    .collect();
                weights.sort();
                assert_eq!(stored.get_or_insert_with(|| weights.clone()), &weights, "{layout}");
                if layout.attention.name() == "batch" {
                    let cache = program.tensor(program.find("k.cache").unwrap()).spec.to_string();
                    assert_eq!(cached.get_or_insert_with(|| cache.clone()), &cache, "{layout}");
                }
            }
        }
        assert_eq!(cached.unwrap(), "B_xyzMKQ");
        let stored = stored.unwrap();
        assert!(stored.contains(&("up.weight".into(), "E_xF_zy".into())), "{stored:?}");
    }
}

/// Figure 2 and A.2: the specs between the collectives are the paper's, as sets.
#[test]
fn specs_are_those_of_the_paper() {
    let model = small(8, 1, Block::Parallel, Mlp::TwoMatrix(Nonlinearity::Gelu));
    let mesh = Mesh::torus(2, 2, 2).unwrap();
    for (layout, residual, gathered, hidden) in [
        ("1d-weight-stationary/heads", "BLE_xyz", "BLE", "BLF_xyz"),
        ("2d-weight-stationary/heads", "BLE_xyz", "BLE_x", "BLF_xyz"),
        ("x-weight-gathered/heads", "B_xLE_yz", "B_xLE", "B_xLF_yz"),
        ("xy-weight-gathered/heads", "B_xyLE_z", "B_xyLE", "B_xyLF_z"),
        ("xyz-weight-gathered/heads", "B_xyzLE", "B_xyzLE", "B_xyzLF"),
    ] {
        let layout: Layout = layout.parse().unwrap();
        let (program, _) = layout.program(&model, &mesh, &Workload::prefill(8, 8), LayoutOptions::default()).unwrap();
        for (name, expected) in [("residual", residual), ("x.normed", gathered), ("h", hidden)] {
            let spec = &program.tensor(program.find(name).unwrap()).spec;
            assert!(spec.same_sets(&expected.parse().unwrap()), "{layout}: {name} is {spec}, not {expected}");
        }
    }
}

#[test]
fn what_does_not_divide_is_refused_with_names_and_numbers() {
    let model = models::by_name("palm-540b").unwrap();
    let program = |layout: &str, mesh: &str, workload: Workload| {
        let layout: Layout = layout.parse().unwrap();
        layout.program(&model, &mesh.parse().unwrap(), &workload, LayoutOptions::default())
    };
    let error = program("2d-weight-stationary/batch", "4x4x4", Workload::decode(16, 2048)).unwrap_err().to_string();
    let expected = "batch: expected a multiple of 64, because the attention shards the batch (xyz), got 16";
    assert_eq!(error, expected);
    let error = program("2d-weight-stationary/heads", "5x4x4", Workload::decode(16, 2048)).unwrap_err().to_string();
    assert_eq!(error, "residual: dimension E of BLE_xzy: expected a multiple of 80, got 18432");
    let error = program("2d-weight-stationary/heads", "x=4,y=4", Workload::decode(16, 2048)).unwrap_err().to_string();
    assert_eq!(error, "mesh: expected the axes x, y and z, got x=4,y=4");
    let error = program("2d-weight-stationary/heads", "4x4x4", Workload::decode(0, 2048)).unwrap_err().to_string();
    assert_eq!(error, "batch: expected 1 to 268435456, got 0");
    let error = "2d-weight-stationery/heads".parse::<Layout>().unwrap_err().to_string();
    assert!(error.ends_with("got `2d-weight-stationery`; did you mean `2d-weight-stationary`?"), "{error}");
    let error = "2d-weight-stationary/head".parse::<Layout>().unwrap_err().to_string();
    assert!(error.contains("did you mean `heads`?"), "{error}");
}
