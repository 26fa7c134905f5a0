"""The peers of `bench peers` and `bench io` that live in PyTorch, and the judge of every contestant's results.

    python3 peers.py FOLDER NAME          answers requests, a JSON object a line, on stdin and stdout
    python3 peers.py FOLDER NAME once CASE    one forward and backward between cudaProfilerStart and Stop, for ncu

FOLDER holds the operands as raw elements: q.bf16, k.bf16, v.bf16, do.bf16 (and .f16), contiguous [B, H, S, D]. NAME is
a contestant (`fa2`, `cudnn`, `flex_attention`, `standard`) or `judge`. Requests:

    {"op": "load", "case": {"batch", "heads", "seq", "dim", "pattern", "element"}}
    {"op": "results", "pass": P, "path": F}      writes o, and dq, dk, dv unless P is forward, of the first and the last head
    {"op": "time", "pass": P, "calls": N}        {"ms": of all N calls}
    {"op": "judge", "pass": P, "path": F}        {"errors": {tensor: [largest error, largest error of the naive reference]}}

The pattern says which keys are seen (`benches/src/peers/pattern.rs`): {"kind": "full"}, "causal", "window" of "keys",
"documents" of "length" positions, "causal" or not, or "random_blocks", whose bytes are then in FOLDER/blocks.u8.

An answer with "error" is a refusal; the process lives on.
"""

import json
import sys
import time
import traceback
from pathlib import Path

try:
    import torch
    import torch.nn.functional as F
    from torch.nn.attention import SDPBackend, sdpa_kernel
except ImportError as error:
    print(json.dumps({"error": f"PyTorch is missing from {sys.executable}: {error}"}), flush=True)
    sys.exit(1)

DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Scores that the judge holds at a time.
SCORES = 1 << 24
# Queries and keys of a random block.
BLOCK = 128


def sync():
    if DEVICE == "cuda":
        torch.cuda.synchronize()


class Case:
    """Operands of a case, `[B, H, S, D]` each."""

    # What was read last, by tensor: the cases of a run are mostly other shapes of the same elements.
    kept = {}

    def __init__(self, folder, spec):
        self.b, self.h, self.s, self.d = (spec[key] for key in ("batch", "heads", "seq", "dim"))
        self.pattern, self.element = spec["pattern"], spec["element"]
        self.causal = self.pattern["kind"] == "causal"
        self.dtype, self.scale = DTYPES[self.element], self.d**-0.5
        self.q, self.k, self.v, self.do = (self.read(folder, name) for name in ("q", "k", "v", "do"))
        if self.pattern["kind"] == "random_blocks":
            n = -(-self.s // BLOCK)
            raw = bytearray((Path(folder) / "blocks.u8").read_bytes())
            self.blocks = torch.frombuffer(raw, dtype=torch.uint8).reshape(self.h, n, n).to(DEVICE).bool()
        self.visible = self.mask()

    def read(self, folder, name):
        # A file may hold more than a case takes.
        count = self.b * self.h * self.s * self.d
        key = (self.element, count)
        if Case.kept.get(name, (None, None))[0] != key:
            path = str(Path(folder) / f"{name}.{self.element}")
            Case.kept[name] = (key, torch.from_file(path, size=count, dtype=self.dtype).to(DEVICE))
        return Case.kept[name][1].reshape(self.b, self.h, self.s, self.d)

    def mask(self):
        """Which keys are seen, (b, h, i, j) -> bool, or None if all are."""
        kind = self.pattern["kind"]
        if kind == "full":
            return None
        if kind == "causal":
            return lambda b, h, i, j: i >= j
        if kind == "window":
            keys = self.pattern["keys"]
            return lambda b, h, i, j: (i >= j) & (i - j < keys)
        if kind == "documents":
            length = self.pattern["length"]
            if self.pattern["causal"]:
                return lambda b, h, i, j: (i // length == j // length) & (i >= j)
            return lambda b, h, i, j: i // length == j // length
        if kind == "random_blocks":
            blocks = self.blocks
            return lambda b, h, i, j: blocks[h, i // BLOCK, j // BLOCK]
        raise ValueError(f"unknown pattern {kind!r}")

    def heads(self):
        """The heads that are judged: a wrong stride shows in the last."""
        return [(0, 0), (self.b - 1, self.h - 1)]


def sdpa(backend):
    def make(case):
        if case.pattern["kind"] not in ("full", "causal"):
            raise ValueError("scaled_dot_product_attention has no such mask without a dense bias")

        def attend(q, k, v):
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, v, is_causal=case.causal)

        return attend

    return make


def flex_attention(case):
    import torch._functorch.config
    from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

    # A compilation a case, and none of one case serves another. A backward is timed several times on one graph, so its
    # buffers must stay.
    torch._dynamo.reset()
    torch._functorch.config.donated_buffer = False
    compiled = torch.compile(flex_attention, dynamic=False)
    mask = None
    if case.pattern["kind"] == "random_blocks":
        # The blocks as they are, each seen whole: no kernel is faster, and nothing of S² is made.
        listed = case.blocks.to(torch.int32)[None]
        counts = listed.sum(-1, dtype=torch.int32)
        columns = torch.argsort(listed, dim=-1, descending=True, stable=True).to(torch.int32)
        none = torch.zeros_like(counts), torch.zeros_like(columns)
        mask = BlockMask.from_kv_blocks(*none, counts, columns, BLOCK_SIZE=BLOCK)
    elif case.visible is not None:
        mask = create_block_mask(case.visible, None, None, case.s, case.s, device=DEVICE)
    return lambda q, k, v: compiled(q, k, v, block_mask=mask)


def standard(case):
    """Attention in three steps, each materialized (Algorithm 0 of arXiv 2205.14135)."""
    hidden = None
    if case.pattern["kind"] not in ("full", "causal"):
        raise ValueError("standard attention is compared with nothing masked and causal only")
    if case.causal:
        hidden = torch.ones(case.s, case.s, dtype=torch.bool, device=DEVICE).triu(1)

    def attend(q, k, v):
        s = q @ k.transpose(-2, -1) * case.scale
        if hidden is not None:
            s = s.masked_fill(hidden, float("-inf"))
        return torch.softmax(s, dim=-1) @ v

    return attend


CONTESTANTS = {
    "fa2": sdpa(SDPBackend.FLASH_ATTENTION),
    "cudnn": sdpa(SDPBackend.CUDNN_ATTENTION),
    "flex_attention": flex_attention,
    "standard": standard,
}


def tracked(case):
    return [x.detach().clone().requires_grad_() for x in (case.q, case.k, case.v)]


def results(case, attend, which):
    if which == "forward":
        with torch.no_grad():
            return [attend(case.q, case.k, case.v)]
    q, k, v = tracked(case)
    o = attend(q, k, v)
    return [o.detach(), *torch.autograd.grad(o, (q, k, v), case.do)]


def milliseconds(case, attend, which, calls):
    """All calls in a row, waited for once."""
    if which == "forward":
        with torch.no_grad():
            sync()
            start = time.perf_counter()
            for _ in range(calls):
                attend(case.q, case.k, case.v)
            sync()
            return (time.perf_counter() - start) * 1e3
    q, k, v = tracked(case)
    o = attend(q, k, v) if which == "backward" else None
    sync()
    start = time.perf_counter()
    for _ in range(calls):
        if which == "backward":
            torch.autograd.grad(o, (q, k, v), case.do, retain_graph=True)
        else:
            torch.autograd.grad(attend(q, k, v), (q, k, v), case.do)
    sync()
    return (time.perf_counter() - start) * 1e3


def write(path, case, tensors):
    """Of each tensor the judged heads, one after the other."""
    with open(path, "wb") as file:
        for x in tensors:
            for b, h in case.heads():
                file.write(x[b, h].contiguous().view(torch.uint8).cpu().numpy().tobytes())


def of_head(case, b, h, kind, rounded):
    """o, dq, dk and dv of one head in `kind`; every matrix passes `rounded` as it would be stored."""
    q, k, v, do = (x[b, h].to(kind) for x in (case.q, case.k, case.v, case.do))
    o, dq = torch.zeros_like(q), torch.zeros_like(q)
    dk, dv = torch.zeros_like(k), torch.zeros_like(v)
    keys = torch.arange(case.s, device=DEVICE)
    chunk = max(SCORES // case.s, 1)
    for i in range(0, case.s, chunk):
        rows = slice(i, min(i + chunk, case.s))
        s = rounded(rounded(q[rows] @ k.T) * case.scale)
        if case.visible is not None:
            s = s.masked_fill(~case.visible(b, h, keys[rows, None], keys[None, :]), float("-inf"))
        p = rounded(torch.softmax(s, dim=-1))
        o[rows] = p @ v
        dp = rounded(do[rows] @ v.T)
        ds = rounded(p * (dp - (p * dp).sum(dim=-1, keepdim=True)))
        ds = rounded(ds * case.scale)
        dq[rows] = ds @ k
        dk += ds.T @ q[rows]
        dv += p.T @ do[rows]
    return [rounded(x) for x in (o, dq, dk, dv)]


class Judge:
    """Largest errors against f64, beside those of a naive reference of the element type: the measure of what that type
    allows (`flashover_testing::tolerance`)."""

    def __init__(self):
        self.case, self.references = None, None

    def of(self, case):
        if self.case is not case:
            exact = lambda x: x
            stored = lambda x: x.to(case.dtype).to(torch.float32)
            self.references = [
                (of_head(case, b, h, torch.float64, exact), of_head(case, b, h, torch.float32, stored))
                for b, h in case.heads()
            ]
            self.case = case
        return self.references

    def judge(self, case, which, path):
        references = self.of(case)
        names = ["o"] if which == "forward" else ["o", "dq", "dk", "dv"]
        size, heads = case.s * case.d, len(references)
        actual = torch.frombuffer(bytearray(Path(path).read_bytes()), dtype=case.dtype).to(DEVICE).double()
        if actual.numel() != len(names) * heads * size:
            return {"error": f"{path}: expected {len(names) * heads * size} elements, got {actual.numel()}"}
        actual = actual.reshape(len(names), heads, case.s, case.d)
        errors = {}
        for n, name in enumerate(names):
            ours, naive = 0.0, 0.0
            for h, (exact, rounded) in enumerate(references):
                if not actual[n, h].isfinite().all():
                    return {"error": f"{name}: not finite in head {h} of those judged"}
                ours = max(ours, (actual[n, h] - exact[n]).abs().max().item())
                naive = max(naive, (rounded[n].double() - exact[n]).abs().max().item())
            errors[name] = [ours, naive]
        return {"errors": errors}


def about():
    if DEVICE == "cpu":
        return f"PyTorch {torch.__version__}, without a GPU"
    return f"PyTorch {torch.__version__}, cuDNN {torch.backends.cudnn.version()}, CUDA {torch.version.cuda}"


def serve(folder, name):
    # The judge's f32 is f32.
    torch.backends.cuda.matmul.allow_tf32 = False
    case = attend = None
    judge = Judge()
    say = sys.stdout.write
    # What libraries print must not stand between answers.
    sys.stdout = sys.stderr

    def answer(request):
        nonlocal case, attend
        op = request["op"]
        if op == "load":
            case = attend = None
            case = Case(folder, request["case"])
            if name != "judge":
                attend = CONTESTANTS[name](case)
            return {}
        which = request["pass"]
        if op == "results":
            write(request["path"], case, results(case, attend, which))
            return {}
        if op == "time":
            return {"ms": milliseconds(case, attend, which, request["calls"])}
        if op == "judge":
            return judge.judge(case, which, request["path"])
        return {"error": f"unknown request {op!r}"}

    say(json.dumps({"about": about()}) + "\n")
    sys.__stdout__.flush()
    for line in sys.stdin:
        try:
            given = answer(json.loads(line))
        except Exception as error:
            traceback.print_exc()
            given = {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
        say(json.dumps(given) + "\n")
        sys.__stdout__.flush()


def once(folder, name, spec):
    case = Case(folder, spec)
    attend = CONTESTANTS[name](case)
    q, k, v = tracked(case)
    torch.autograd.grad(attend(q, k, v), (q, k, v), case.do)
    sync()
    torch.cuda.profiler.start()
    torch.autograd.grad(attend(q, k, v), (q, k, v), case.do)
    sync()
    torch.cuda.profiler.stop()


if __name__ == "__main__":
    if len(sys.argv) == 5 and sys.argv[3] == "once":
        once(sys.argv[1], sys.argv[2], json.loads(sys.argv[4]))
    elif len(sys.argv) == 3 and (sys.argv[2] == "judge" or sys.argv[2] in CONTESTANTS):
        serve(sys.argv[1], sys.argv[2])
    else:
        sys.exit(__doc__)
