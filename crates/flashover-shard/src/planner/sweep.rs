//! The sweep itself: meshes are shared among threads, and everything that does not depend on the batch or the type of
//! weights is counted once.

use std::collections::{HashMap, HashSet};
use std::sync::atomic::{AtomicUsize, Ordering};

use super::{Plan, Point, Query, Refusal, Sweep};
use crate::cost::{Sheet, SheetInput, paper_twin};
use crate::error::ShardError;
use crate::layout::{Layout, Plan as AxisPlan, ProgramCache};
use crate::mesh::Mesh;
use crate::workload::Phase;

/// Costs every candidate of a query.
///
/// # Errors
///
/// If the query is not sound. What only some candidates lack is a [`Refusal`], not an error.
pub fn sweep(query: &Query) -> Result<Sweep, ShardError> {
    sweep_with(query, |_| {})
}

/// As [`sweep`], calling `progress` with the number of meshes done, from any thread.
///
/// # Errors
///
/// As [`sweep`].
pub fn sweep_with(query: &Query, progress: impl Fn(usize) + Sync) -> Result<Sweep, ShardError> {
    query.validate()?;
    let next = AtomicUsize::new(0);
    let done = AtomicUsize::new(0);
    let threads = std::thread::available_parallelism().map_or(1, |n| n.get()).min(query.meshes.len());
    let work = || {
        let mut worker = Worker::new(query);
        while let Some(mesh) = query.meshes.get(next.fetch_add(1, Ordering::Relaxed)) {
            worker.mesh(mesh);
            progress(done.fetch_add(1, Ordering::Relaxed) + 1);
        }
        worker
    };
    let workers: Vec<Worker> = std::thread::scope(|scope| {
        let handles: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
        handles.into_iter().map(|handle| handle.join().expect("a worker does not panic")).collect()
    });
    Ok(merge(workers))
}

type Key = (Point, Layout);

/// What one thread has found.
struct Worker<'a> {
    query: &'a Query,
    twin: crate::architecture::Architecture,
    programs: ProgramCache,
    twins: ProgramCache,
    costed: usize,
    refused: usize,
    best: HashMap<Key, Plan>,
    refusals: HashMap<(Phase, Layout, usize, Option<usize>), String>,
}

impl<'a> Worker<'a> {
    fn new(query: &'a Query) -> Self {
        Worker {
            query,
            twin: paper_twin(&query.model),
            programs: ProgramCache::default(),
            twins: ProgramCache::default(),
            costed: 0,
            refused: 0,
            best: HashMap::new(),
            refusals: HashMap::new(),
        }
    }

    fn mesh(&mut self, mesh: &Mesh) {
        for &phase in &self.query.phases {
            for &layout in &self.query.layouts {
                self.layout(mesh, phase, layout);
            }
        }
    }

    fn layout(&mut self, mesh: &Mesh, phase: Phase, layout: Layout) {
        let Query { batches, weights, .. } = self.query;
        match self.sheet(mesh, phase, layout) {
            Ok((sheet, unit)) => {
                for &batch in batches {
                    if batch % unit == 0 {
                        weights.iter().for_each(|&weights| self.candidate(mesh, layout, &sheet, phase, batch, weights));
                    } else {
                        self.refused += weights.len();
                        let reason = || format!("batch: expected a multiple of {unit}, got {batch}");
                        self.refusals.entry((phase, layout, mesh.chips(), Some(batch))).or_insert_with(reason);
                    }
                }
            }
            Err(error) => {
                self.refused += batches.len() * weights.len();
                self.refusals.entry((phase, layout, mesh.chips(), None)).or_insert_with(|| error.to_string());
            }
        }
    }

    /// The sheet of a layout at the smallest batch that it accepts, and that batch.
    fn sheet(&mut self, mesh: &Mesh, phase: Phase, layout: Layout) -> Result<(Sheet, usize), ShardError> {
        let Query { model, hardware, options, precision, .. } = self.query;
        hardware.accepts(mesh)?;
        let plan = AxisPlan::new(layout, model, mesh, phase, *options)?;
        let unit = mesh.group_size(&plan.batch_axes().0)?;
        let workload = self.query.workload(phase, unit);
        let sizes = plan.sizes(model, mesh, &workload)?;
        // Most meshes of most numbers of chips end here.
        let program = self.programs.get(&plan, model);
        program.check(mesh, &sizes)?;
        // The twin has the same heads, so the same plan and sizes.
        let twin = self.twins.get(&plan, &self.twin);
        let sheet = Sheet::new(&SheetInput {
            model,
            hardware,
            mesh,
            workload: &workload,
            precision: *precision,
            program: (program, &sizes),
            twin: Some((twin, &sizes)),
        })?;
        Ok((sheet, unit))
    }

    fn candidate(
        &mut self,
        mesh: &Mesh,
        layout: Layout,
        sheet: &Sheet,
        phase: Phase,
        batch: usize,
        weights: crate::precision::WeightType,
    ) {
        self.costed += 1;
        let cost = sheet.cost(batch, weights, self.query.mode, self.query.overlap);
        let fits = sheet.check_memory(batch, weights).is_ok();
        let point = Point { phase, chips: mesh.chips(), batch, weights };
        let better = |old: &Plan| (!fits, cost.seconds) < (!old.fits, old.cost.seconds);
        if self.best.get(&(point, layout)).is_none_or(better) {
            let (weight_layout, attention_layout) = (layout.weights, layout.attention);
            let (mesh, memory) = (mesh.clone(), sheet.memory(batch, weights));
            self.best
                .insert((point, layout), Plan { point, weight_layout, attention_layout, mesh, cost, memory, fits });
        }
    }
}

/// Brings together what the threads have found, in an order that does not depend on them.
fn merge(workers: Vec<Worker>) -> Sweep {
    let mut best: HashMap<Key, Plan> = HashMap::new();
    let mut refusals = HashMap::new();
    let (mut costed, mut refused) = (0, 0);
    for worker in workers {
        costed += worker.costed;
        refused += worker.refused;
        for (key, plan) in worker.best {
            let order = |p: &Plan| (!p.fits, p.cost.seconds, p.mesh.axes().to_vec());
            match best.get(&key) {
                Some(old) if order(old) <= order(&plan) => {}
                _ => {
                    best.insert(key, plan);
                }
            }
        }
        refusals.extend(worker.refusals);
    }
    let mut plans: Vec<_> = best.into_values().collect();
    plans.sort_by(|a, b| {
        let key = |plan: &Plan| (plan.point, !plan.fits);
        key(a).cmp(&key(b)).then(a.cost.seconds.total_cmp(&b.cost.seconds)).then(a.layout().cmp(&b.layout()))
    });
    let mut refusals: Vec<_> = refusals
        .into_iter()
        .map(|((phase, layout, chips, batch), reason)| Refusal { phase, layout, chips, batch, reason })
        .collect();
    // A layout that some mesh accepts is not refused.
    let place = |plan: &Plan, batch| (plan.point.phase, plan.layout(), plan.point.chips, batch);
    let planned: HashSet<_> =
        plans.iter().flat_map(|plan| [place(plan, None), place(plan, Some(plan.point.batch))]).collect();
    refusals.retain(|r| !planned.contains(&(r.phase, r.layout, r.chips, r.batch)));
    refusals.sort_by_key(|r| (r.phase, r.chips, r.layout, r.batch));
    Sweep { costed, refused, plans, refusals }
}
