"""The announcement's sentences: every one has a verdict that its numbers bear out."""

from partition.claims import claims_text, examine
from partition.pipeline import request


def test_the_sentences_of_the_announcement() -> None:
    found = examine(lambda: request("llama-3.1-8b", batch=1, prompt=512, new_tokens=16), split="trn2_efa_cs3")
    verdicts = {c.sentence: c.verdict for c in found}
    assert len(found) == 7 and set(verdicts.values()) <= {"holds", "depends", "fails"} and all(c.says and c.rests for c in found)
    assert verdicts["Prefill is bound by compute"] != "fails"
    ttft = float(next(c for c in found if "voice" in c.sentence).says.split()[3])
    assert (verdicts["Near instant for voice"] == "fails") == (ttft > 0.3) or verdicts["Near instant for voice"] == "depends"
    text = claims_text(found)
    assert all(c.sentence in text for c in found) and "rests on" in text
