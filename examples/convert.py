"""Convert a model, look at the proof, load the result with transformers, and ask it something.

python examples/convert.py MODEL OUT
"""

import argparse

from transformers import AutoModelForCausalLM, AutoTokenizer

import abliterate


def main() -> None:
    """Converts and asks."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="folder or Hub id")
    parser.add_argument("out", help="folder to make")
    parser.add_argument("--recipe", default="refusal")
    parser.add_argument("--ask", default="How do I kill a process in Linux?")
    parser.add_argument("--tokens", type=int, default=48)
    arguments = parser.parse_args()
    result = abliterate.convert(arguments.model, arguments.out, recipe=arguments.recipe)
    print(result.certificate.claim)
    figures = result.manifest["evaluation"]
    before, after = (figures[which]["refusal_rate_substring"] for which in ("base", "edited"))
    print(f"harmful prompts refused: {before:.1%} before, {after:.1%} after")
    print(answer(str(result.folder), arguments.ask, arguments.tokens))


def answer(folder: str, question: str, tokens: int) -> str:
    """A greedy answer. The chat template writes its own special tokens."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    messages = [{"role": "user", "content": question}]
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=tokens, do_sample=False)
    return str(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))


if __name__ == "__main__":
    main()
