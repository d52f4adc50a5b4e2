"""What the tensor-parallel ranks of an engine tell each other about a step's rows.

Runs in every worker, after the forward pass. Each rank clamps its own copy of the
stream, but only rank 0 answers to the engine core: a hook that ran there and not on
another rank would go unnoticed, and its tokens would be served half clamped.
"""

from vllm_guard.rows import StepRows

__all__ = ["agree"]


def agree(rows: StepRows) -> None:
    """Let a row count as guarded only if it passed every hook on every rank.

    One small collective a step, and none where there is one rank. Nothing but the
    count of visits is compared: row map, policies and SAEs are the same on all ranks
    because each of them read the same step, file and digests.
    """
    from vllm.distributed import get_tp_group

    group = get_tp_group()
    if group.world_size == 1:
        return
    visits = rows.step.marks_of(rows.num_rows).visits
    # A sum in fp32: what the fast all-reduce of every platform can do, exactly.
    missed = group.all_reduce(visits.ne(rows.num_hooks).float())
    visits.masked_fill_(missed.ne(0), 0)
