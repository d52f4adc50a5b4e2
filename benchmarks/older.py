"""What a vLLM older than the guard supports lacks, for a GPU whose torch is older.

vLLM 0.26 is the newest release for torch 2.11. All seams of the guard are in it; what
is missing are names for features it does not have. They live here and not in the
product, which refuses that version. An installation runs on it if it names
`benchmarks.older:register` as the entry point `guard` of `vllm.general_plugins`, in
place of `vllm_guard:register`.
"""

__all__ = ["OLDEST", "register"]

OLDEST = (0, 26)


def register() -> None:
    """Be the plugin: supply what is missing, and then the guard."""
    import vllm_guard

    _supply()
    vllm_guard.register()


def _supply() -> None:
    from vllm.config import ParallelConfig
    from vllm.v1.core.sched.output import NewRequestData
    from vllm.v1.engine import EngineCoreOutput
    from vllm.v1.outputs import ModelRunnerOutput
    from vllm_guard import compat

    compat.OLDEST = OLDEST
    absent = property(lambda _: None, lambda *_: None)
    ParallelConfig.enable_hc_sp = False
    NewRequestData.prompt_len = property(lambda data: len(data.prompt_token_ids))
    ModelRunnerOutput.prompt_token_id_logprobs_dict = property(lambda _: {})
    EngineCoreOutput.prompt_token_id_logprobs = absent
    EngineCoreOutput.new_sampling_mask = absent
