"""What the table of a difference says of a group of tensors."""

from rich.console import Console

from abliterate.publish.difference_view import changed_table


def test_experts_are_told_by_their_layers() -> None:
    tensors = [
        {
            "name": f"model.layers.{layer}.mlp.experts.{expert}.down_proj.weight",
            "other": f"model.layers.{layer}.mlp.experts.{expert}.down_proj.weight",
            "state": "full-rank",
            "role": "writer",
            "relative": 0.1,
            "spectrum": (),
            "fit": None,
            "dtypes": ("BF16", "BF16"),
        }
        for layer in (2, 3)
        for expert in (0, 7, 63)
    ]
    console = Console(width=200)
    with console.capture() as said:
        console.print(changed_table(tensors))
    assert "layers 2–3" in said.get() and "63" not in said.get()
