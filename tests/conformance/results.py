"""What requests got, in a form that two runs can be compared by."""


def results(outputs: list[dict]) -> list[dict]:
    """The outputs without their metrics, which stages from 5 on add and which hold times."""
    return [{k: v for k, v in output.items() if k != "metrics"} for output in outputs]
