"""Profiles of made-up models, for tests of the planner that need no model."""

from weft.capture.profile import (
    LOSS,
    NO_GROUP,
    Affine,
    Call,
    Operation,
    Output,
    Parameter,
    Profile,
    Recomputed,
    Saved,
    Source,
    TensorGroup,
)
from weft.plan import TensorStyle


def gpt(
    layers: int = 8,
    hidden: int = 256,
    heads: int = 8,
    context: int = 128,
    vocabulary: int = 256,
    batch_size: int = 32,
    tied: bool = False,
) -> Profile:
    """A GPT in float32: embedding, ``layers`` blocks of attention and MLP, head and loss."""
    h, t = hidden, context
    token = 4.0 * h * t  # bytes of one sample's hidden states
    parameters: dict[str, Parameter] = {}
    groups: list[TensorGroup] = []
    calls: list[Call] = []

    def linear(name: str, rows: int, columns: int, group: int = NO_GROUP, dim: int | None = None) -> str:
        parameters[name] = Parameter((name,), (rows, columns), 4 * rows * columns, True, dim, group)
        return name

    def matmul(rows: int, columns: int, group: int = NO_GROUP) -> Operation:
        flops = Affine(0, 2.0 * t * rows * columns)
        return Operation("aten.addmm", "matmul", flops, Affine(4.0 * rows * columns, 4.0 * t * (rows + columns)), group)

    def pointwise(kind: str, size: float, group: int = NO_GROUP) -> Operation:
        return Operation("aten.x", kind, Affine(0, 0), Affine(0, 2 * size), group)

    def call(
        name: str, kind: int, forward, saved, inputs, parameter_names, leaves=(token,), workspace=token, recompute=()
    ) -> None:
        calls.append(
            Call(
                name,
                name if name != LOSS else "",
                kind,
                tuple(forward),
                tuple(op for op in forward for _ in range(2)),
                tuple(saved),
                tuple(inputs),
                tuple(Output(Affine(0, size), True) for size in leaves),
                tuple(parameter_names),
                (),
                Affine(0, workspace),
                dict(recompute),
            )
        )

    table = linear("token.weight", vocabulary, h)
    call("token", 0, [pointwise("gather", token)], [Saved(Affine(0, 8.0 * t))], [], [table])
    for i in range(layers):
        unit, a = f"blocks.{i}", len(groups)
        groups += [
            TensorGroup(
                unit,
                (
                    *((f"{unit}.attention.{n}", TensorStyle("colwise")) for n in ("query", "key", "value")),
                    (f"{unit}.attention.out", TensorStyle("rowwise")),
                ),
                (("heads", heads), ("features", h)),
                Affine(0, token),
                Affine(0, token),
            ),
            TensorGroup(
                unit,
                ((f"{unit}.mlp.0", TensorStyle("colwise")), (f"{unit}.mlp.2", TensorStyle("rowwise"))),
                (("features", 4 * h),),
                Affine(0, token),
                Affine(0, token),
            ),
        ]
        names = [
            linear(f"{unit}.attention.{n}.weight", h, h, a, 1 if n == "out" else 0)
            for n in ("query", "key", "value", "out")
        ]
        names += [
            linear(f"{unit}.mlp.0.weight", 4 * h, h, a + 1, 0),
            linear(f"{unit}.mlp.2.weight", h, 4 * h, a + 1, 1),
        ]
        attention = Operation("aten.sdpa", "attention", Affine(0, 4.0 * t * t * h), Affine(0, 4 * token), a)
        forward = [
            pointwise("normalization", token),
            *[matmul(h, h, a)] * 3,
            attention,
            matmul(h, h, a),
            pointwise("normalization", token),
        ]
        forward += [matmul(h, 4 * h, a + 1), pointwise("transcendental", 4 * token, a + 1), matmul(4 * h, h, a + 1)]
        saved = [Saved(Affine(0, 4 * token)), Saved(Affine(0, 4 * token), a), Saved(Affine(0, 8 * token), a + 1)]
        cheap = [op for op in forward if op.kind not in ("matmul", "attention")]
        again = {
            "selective": Recomputed(
                (Saved(Affine(0, token)), *saved[1:2], Saved(Affine(0, 4 * token), a + 1)), tuple(cheap)
            ),
            "full": Recomputed((Saved(Affine(0, token)),), tuple(forward)),
        }
        call(unit, 1, forward, saved, [Source(i, 0)], names, recompute=again)
    names = [table] if tied else [linear("head.weight", vocabulary, h)]
    logits = 4.0 * t * vocabulary
    call("head", 2, [matmul(h, vocabulary)], [Saved(Affine(0, token))], [Source(layers, 0)], names, (logits,))
    call(LOSS, 3, [pointwise("softmax", logits)], [Saved(Affine(0, logits))], [Source(layers + 1, 0)], [], (), logits)
    return Profile(tuple(calls), parameters, tuple(groups), (), 2.0, 7.0, batch_size, 8 * t, 0.0)
