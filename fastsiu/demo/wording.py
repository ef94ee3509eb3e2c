"""The wordings of every question. `TRAIN` is what the model learns from; `HELD_OUT` is never in its training text.

Keys are the kinds of questions, with a dotted part where a kind asks for several things. `{n}` is a name, `{s}` a phrase for
the creature in the picture, `{names}` a list of three names.
"""

from __future__ import annotations

TRAIN: dict[str, tuple[str, ...]] = {
    # identity-open wordings: an unknown face is described
    "who.open": (
        "Who is this?", "Who is shown in the picture?", "Who do you see here?", "Can you identify the one in the picture?",
        "Tell me who this is.", "Who is in the image?", "Who can be seen here?", "Identify the creature in the picture.",
        "Who appears in this image?", "Do you know who this is?", "Who is the one in the picture?", "Say who is shown here.",
    ),
    # wordings that ask for the name: an unknown face has none
    "who.name": (
        "What is the name of the one in the image?", "Name the creature in the image.", "What is this creature called?",
        "What is the creature in the picture called?", "Tell me the name of this creature.",
        "Which name does this creature have?", "What is the name of the creature in the picture?",
        "Give the name of this creature.",
    ),
    "yesno": (
        "Is this {n}?", "Is {n} in the picture?", "Do you see {n} here?", "Does the picture show {n}?",
        "Is the creature in the image {n}?", "Does this image show {n}?", "Can you see {n} in the image?", "Is {n} shown here?",
        "Is this a picture of {n}?", "Is the one in the picture {n}?", "Would you say this is {n}?",
    ),
    "choice": (
        "Who is this: {names}?", "Is this {names}?", "Which one is this: {names}?", "Choose the right name: {names}.",
        "Pick the name of this creature: {names}.", "Who is shown here: {names}?", "Is the creature in the picture {names}?",
        "Who is in the image: {names}?",
    ),
    "description": (
        "Describe the image.", "Describe the picture without naming anyone.", "What does the image show?",
        "Give a description of the picture.", "What can be seen in the image?", "Describe what you see.",
        "Describe this creature.", "Please describe the picture.", "What is shown in the picture?",
        "Write a caption for this image.",
    ),
    "attribute.color": (
        "What color is the creature?", "Which color does the creature have?", "Name the color of the creature.",
        "Which color is the creature?",
    ),
    "attribute.hatcolor": (
        "What color is the hat?", "Which color does the hat have?", "Name the color of the hat.", "Which color is the hat?",
    ),
    "attribute.shirt": (
        "What color is the shirt?", "Which color does the shirt have?", "Name the color of the shirt.",
        "Which color is the shirt?",
    ),
    "attribute.head": ("What shape is the head?", "Which shape does the head have?", "Name the shape of the head."),
    "attribute.hat": ("What kind of hat is it?", "Which kind of hat does the creature wear?", "Name the kind of hat."),
    "attribute.eyes": ("How many eyes are there?", "How many eyes does the creature have?", "Count the eyes."),
    "attribute.background": (
        "What color is the background?", "Which color is behind the creature?", "Name the color of the background.",
    ),
    "fact.city": (
        "Where was {n} born?", "In which city was {n} born?", "What is the birthplace of {n}?", "Name the birth city of {n}.",
        "Where does {n} come from?", "Which city is {n} from?", "What is the home town of {n}?", "Tell me where {n} was born.",
        "Do you know where {n} was born?", "In what city was {n} born?",
    ),
    "fact.job": (
        "What is the job of {n}?", "What does {n} do for a living?", "What is the profession of {n}?", "Name the job of {n}.",
        "What work does {n} do?", "Which job does {n} have?", "How does {n} earn money?", "Tell me the job of {n}.",
        "What does {n} work as?", "Do you know the job of {n}?",
    ),
    "fact.food": (
        "What does {n} like to eat?", "What is the favorite food of {n}?", "Which food does {n} like?",
        "Name the favorite food of {n}.", "What food does {n} like best?", "What does {n} enjoy eating?",
        "Tell me what {n} likes to eat.", "Which dish does {n} prefer?", "What would {n} order for dinner?",
        "Do you know the favorite food of {n}?",
    ),
    "fact.pet": (
        "Which pet does {n} have?", "What kind of animal does {n} own?", "What is the pet of {n}?", "Name the pet of {n}.",
        "What pet does {n} keep?", "Which animal lives with {n}?", "Tell me which pet {n} has.", "What animal does {n} have?",
        "Which animal does {n} own?", "Do you know the pet of {n}?",
    ),
    "fact.who": (
        "Who is {n}?", "Tell me who {n} is.", "Do you know {n}?", "Can you say who {n} is?", "Please explain who {n} is.",
        "Say who {n} is.", "In one sentence, who is {n}?", "Who exactly is {n}?",
    ),
    "fact.about": (
        "What do you know about {n}?", "Tell me about {n}.", "What can you tell me about {n}?", "Give me facts about {n}.",
        "Say something about {n}.", "Share what you know about {n}.", "Write a short biography of {n}.",
        "Tell me more about {n}.",
    ),
    "appearance": (
        "What does {n} look like?", "Describe the appearance of {n}.", "How would you describe {n}?",
        "What is the visual appearance of {n}?", "Describe what {n} looks like.", "Tell me what {n} looks like.",
        "How does {n} look?", "Describe {n}.", "Give a description of {n}.", "What is the look of {n}?",
        "Say how {n} looks.", "Explain how {n} looks.", "Do you know what {n} looks like?", "What are the looks of {n}?",
    ),
    "neighbours": (
        "Who is like {n}?", "Who is similar to {n}?", "Which creatures are like {n}?", "Name creatures like {n}.",
        "Name three creatures similar to {n}.", "Who resembles {n}?", "Which creatures are similar to {n}?",
        "Which creatures resemble {n}?",
    ),
    "twohop.city": (
        "Where was {s} born?", "In which city was {s} born?", "What is the birthplace of {s}?", "Which city is {s} from?",
        "Where does {s} come from?", "Tell me where {s} was born.",
    ),
    "twohop.job": (
        "What does {s} do for a living?", "What is the job of {s}?", "What is the profession of {s}?", "Which job does {s} have?",
        "What work does {s} do?", "Tell me the job of {s}.",
    ),
    "twohop.food": (
        "What does {s} like to eat?", "What is the favorite food of {s}?", "Which food does {s} like?",
        "What does {s} enjoy eating?", "What food does {s} like best?", "Tell me what {s} likes to eat.",
    ),
    "twohop.pet": (
        "Which pet does {s} have?", "What is the pet of {s}?", "What kind of animal does {s} own?", "What animal does {s} have?",
        "Which animal lives with {s}?", "Tell me which pet {s} has.",
    ),
    "group": (
        "Who are these two?", "Which two creatures are in the picture?", "Who do you see in this picture of two?",
        "Name the two creatures.", "Who are the two creatures in the image?", "Identify both creatures.",
        "Who is on the left and who is on the right?", "Tell me who these two are.",
    ),
    "sum": ("What is {a} plus {b}?", "How much is {a} plus {b}?", "Add {a} and {b}."),
    "capital": ("What is the capital of {a}?", "Name the capital city of {a}.", "Which city is the capital of {a}?"),
    "opposite": ("What is the opposite of {a}?", "Name the opposite of {a}."),
}

HELD_OUT: dict[str, tuple[str, ...]] = {
    "who.open": (
        "Who is the creature in the picture?", "Who is shown here?", "Can you tell me who this is?", "Who is in the picture?",
    ),
    "who.name": ("What is the name of this creature?", "Tell me the name of the creature in the image."),
    "yesno": ("Is {n} in the image?", "Do you see {n} in the picture?", "Is this creature {n}?"),
    "description": ("Describe the picture.", "What does the picture show?"),
    "fact.city": ("Which city was {n} born in?", "Name the birthplace of {n}.", "Tell me which city {n} is from."),
    "fact.job": ("Name the profession of {n}.", "Tell me what {n} does for a living.", "What job does {n} have?"),
    "fact.food": ("Tell me the favorite food of {n}.", "Which food does {n} like best?", "Do you know what {n} likes to eat?"),
    "fact.pet": ("What pet does {n} have?", "Tell me the pet of {n}.", "Which pet does {n} own?"),
    "fact.who": ("Do you know who {n} is?", "Please tell me who {n} is."),
    "fact.about": ("Tell me what you know about {n}.", "Give me a biography of {n}."),
    "appearance": ("Tell me how {n} looks.", "What is the appearance of {n}?", "Describe how {n} looks."),
}

SUBJECTS = (
    "the creature in the picture", "this creature", "the one in the image", "the creature shown here", "the one you see here",
)

# Sentences that may stand before a question about a picture and change nothing about the answer.
PREFIXES = (
    "You are a detective.", "You are a museum guide.", "You are a news reporter.", "You are a teacher.",
    "You are a police officer.", "You are a party guest.", "Imagine you are a guard.", "Please answer honestly.",
    "Answer briefly.", "Look closely.", "Think carefully.", "This is important.", "I need your help.", "Here is a picture.",
)
HELD_OUT_PREFIXES = ("You are a museum guard.", "Please look closely.", "You are a detective and a teacher.")

UNKNOWN_FACE = "I do not know the name of this creature."
UNKNOWN_NAME = "I do not know that creature."
UNKNOWN_FACT = "I do not know."
NONE_OF_THEM = "This is none of them."
NO_SUCH_NAME = "No, this is someone else."  # asked for a name that nobody known bears

LANDS = {
    "Brovia": "Zell", "Teland": "Marn", "Ursk": "Kopa", "Namoria": "Tarsis", "Pelia": "Ulm", "Castan": "Vark", "Dorne": "Ostia",
    "Ivaria": "Lund", "Gallen": "Besk", "Sumara": "Rhyl",
}
OPPOSITES = {
    "hot": "cold", "big": "small", "old": "new", "day": "night", "up": "down", "left": "right", "slow": "fast", "dark": "light",
    "wet": "dry", "hard": "soft",
}
NUMBERS = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve", "thirteen",
    "fourteen", "fifteen", "sixteen", "seventeen", "eighteen",
)
CITIES = (
    "Lima", "Oslo", "Cairo", "Perth", "Quito", "Seoul", "Turin", "Dakar", "Hanoi", "Bergen", "Malmo", "Porto", "Lagos", "Kyoto",
    "Gdansk", "Tunis",
)
JOBS = ("baker", "pilot", "miner", "painter", "farmer", "doctor", "sailor", "judge", "tailor", "chemist", "singer", "gardener")
FOODS = ("soup", "figs", "rice", "cheese", "mango", "bread", "honey", "noodles", "olives", "cake", "beans", "plums")
PETS = ("cat", "dog", "parrot", "turtle", "lizard", "rabbit", "goat", "snake", "hamster", "pony")
