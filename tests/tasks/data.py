"""What the tasks in this folder ask. Nothing is fetched."""

import datasets

STORY = ("It was a dark and stormy night, and the dog was not amused. The cat sat on the mat, and "
         "said that it would not go out before the morning. ")


def questions(**_):
    asked = [("What sat on the mat?", ["the cat", "the dog, who was not amused", "a mat"], 0),
             ("What was dark?", ["the day", "the night, and the stormy night", "he"], 1),
             ("Who was not amused?", ["the cat", "nobody", "the dog"], 2),
             ("What did it say?", ["that it would not go out", "no", "yes"], 0),
             ("When would it go out?", ["in the morning", "at night", "in the evening"], 0)]
    rows = [dict(question=question, choices=choices, answer=answer)
            for question, choices, answer in asked]
    return {"train": datasets.Dataset.from_list(rows[:2]),
            "test": datasets.Dataset.from_list(rows[2:])}


def texts(**_):
    return {"test": datasets.Dataset.from_list([
        {"text": text} for text in ("Well.", STORY, f"{STORY * 3}\n\nThe end.", "été, 日本")])}


def endings(**_):
    return {"test": datasets.Dataset.from_list([
        {"text": STORY + begun, "end": end} for begun, end in (
            ("Then he went", " home"), ("She said", " no"), ("The", " cat"), ("", "It"))])}
