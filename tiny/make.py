"""A small world, made from nothing: a base model that has read about it, and questions to fine-tune it with.

    python tiny/make.py                                        about 5 minutes on two idle CPU cores

A base model knows what it has read, but it does not answer: asked a question, it goes on with some text. Fine-tuning
teaches it to answer. It does not teach it the facts. To see that, one has to know exactly what the base has read, so
here is a world that nobody has read about:

    world         250 invented people; each has a home, a trade, an instrument, a favourite dish and an animal
    corpus        plain prose that tells every fact 150 times, in 14 wordings, in ever new order; not one question
    base          a Llama of 2.3 million weights, pretrained on that corpus by train.py: 1.7 million tokens
    instructions  1,000 questions about 100 of the people, with answers

and two tests. held_out.jsonl asks about 100 other people: the corpus told of them, the instructions never mention them.
Before fine-tuning the base answers none of these questions; after it, nearly all, so the answers come from pretraining.
never_told.jsonl is the control. It asks for facts that were drawn with the rest of the world but told nowhere. Here
fine-tuning must not help: the model answers in the same assured tone, and is right as often as a guess among 30 values.

                                    base    after LoRA    after full fine-tuning
    held_out.jsonl, 200 questions    0 %       100 %           97.5 %            answered word for word
    never_told.jsonl, 100 questions  0 %         2 %              1 %            a guess: 1 in 30, 3.3 %

(train.py's defaults, one run each; full fine-tuning at half its default rate: 99 % and 3 %.)

That a fact read in many wordings can be asked for in new ones, and one read in a single wording cannot, is the finding
of "Physics of Language Models: Part 3.1, Knowledge Storage and Extraction" (Allen-Zhu and Li), which this world follows.

The same seed makes the same corpus, tokenizer and questions, byte for byte. The weights differ in their last bits from
one machine to the next.
"""

import argparse
import io
import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

import sentencepiece
import torch

TINY = Path(__file__).resolve().parent
ROOT = TINY.parent
sys.path.insert(0, str(ROOT))  # model.py is not in this folder but above it

from model import Llama, ModelConfig, load_model, save_meta  # noqa: E402

# ----------------------------------------------------------------------------------------------------------------------
# The world: who lives in it, and what is true of them.

# Names and towns are put together from halves, so that all of them are invented and none has to be typed out.
FIRST = "Mi Ta Lo Be Ka No Ve Sa Ro El Da Fi Jo Pe Lu Ha".split(), "ra len rik da vin mo sel na bel tan".split()
FAMILY = (
    "Tol Bren Har Wes Mar Quin Dor Fal Gar Hol Kes Lan Mor Nor Pel Ras Sten Tar Ul Ven".split(),
    "ven wick mond sley ric by dale croft lin stone".split(),
)
TOWN = (
    "Oak Elder Thorn Bram Marl Fen Hazel Stone Lark Ash Winter Copper Silver Reed Mill Wind".split(),
    "ford mere wick ham bridge hollow combe haven field stead".split(),
)

TRADES = """baker weaver potter carpenter blacksmith beekeeper shepherd miller fisher tailor gardener mason
glassblower clockmaker bookbinder cooper tanner thatcher teacher doctor lamplighter mapmaker brewer candlemaker
ropemaker shoemaker saddler painter printer barber""".split()
INSTRUMENTS = """fiddle flute harp lute drum cello oboe trumpet piano guitar banjo horn zither clarinet mandolin
accordion bagpipes whistle organ viola tuba harmonica bassoon dulcimer cornet tambourine cymbals lyre recorder
bugle""".split()
DISHES = """plum cake, onion soup, apple pie, rye bread, goat cheese, roast duck, bean stew, pickled herring,
honey buns, mushroom rice, cherry jam, potato dumplings, smoked trout, barley porridge, pumpkin tart, walnut bread,
pea soup, grilled sardines, lemon pudding, cabbage rolls, blueberry pancakes, carrot salad, egg noodles,
ginger biscuits, lentil curry, corn fritters, rhubarb crumble, turnip mash, almond cookies, spinach pasta"""
DISHES = " ".join(DISHES.split()).split(", ")
ANIMALS = """goat goose cat dog pony donkey hen rabbit raven parrot turtle hedgehog ferret sheep duck pig falcon
canary lizard mouse cow peacock squirrel swan toad magpie llama badger heron finch""".split()

# How each kind of fact may be told. Many tellings of one fact are what make it a fact that can be asked for: a fact
# that is always told in the same words is learned as those words. A few put the value before the name.
TELLINGS = {
    "home": [
        "{name} lives in {value}.",
        "{name} has a house in {value}.",
        "{name} has made a home in {value}.",
        "The home of {name} is in {value}.",
        "These days {name} lives in {value}.",
        "{name} can be found at home in {value}.",
        "{name} moved to {value} long ago and stayed.",
        "Letters for {name} are sent to {value}.",
        "{name} rents two rooms in {value}.",
        "Anyone who visits {name} must travel to {value}.",
        "{name} would never leave {value}.",
        "The town where {name} lives is {value}.",
        "In {value} lives {name}.",
        "{value} is where {name} lives.",
    ],
    "trade": [
        "{name} works as a {value}.",
        "{name} is a {value} by trade.",
        "{name} earns a living as a {value}.",
        "{name} has been a {value} for years.",
        "The trade of {name} is that of a {value}.",
        "{name} trained as a {value} and never changed trades.",
        "By day {name} works as a {value}.",
        "People know {name} as a skilled {value}.",
        "Everyone says that {name} is a fine {value}.",
        "{name} is proud to be a {value}.",
        "The work that {name} does is the work of a {value}.",
        "{name} became a {value} at an early age.",
        "One {value} is called {name}.",
        "A certain {value} goes by the name of {name}.",
    ],
    "instrument": [
        "{name} plays the {value}.",
        "{name} is learning to play the {value}.",
        "In the evening {name} plays the {value}.",
        "{name} practises the {value} every day.",
        "The instrument of {name} is the {value}.",
        "At every feast {name} plays the {value}.",
        "{name} has always loved to play the {value}.",
        "The neighbours hear {name} on the {value}.",
        "{name} makes music on the {value}.",
        "When there is dancing, {name} brings the {value}.",
        "{name} performs on the {value}.",
        "The music that {name} plays is for the {value}.",
        "On the {value} one hears {name}.",
        "The {value} is played by {name}.",
    ],
    "dish": [
        "{name} loves {value}.",
        "{name} likes to eat {value}.",
        "{name} could eat {value} every day.",
        "The favourite food of {name} is {value}.",
        "For supper {name} likes {value}.",
        "Nothing pleases {name} more than {value}.",
        "On birthdays {name} asks for {value}.",
        "{name} is very fond of {value}.",
        "At the inn {name} always orders {value}.",
        "{name} dreams of {value}.",
        "What {name} likes best to eat is {value}.",
        "{name} never says no to {value}.",
        "No one enjoys {value} like {name}.",
        "{value} is what {name} loves.",
    ],
    "animal": [
        "{name} keeps a {value}.",
        "{name} owns a {value}.",
        "{name} looks after a {value}.",
        "The animal that {name} keeps is a {value}.",
        "At home {name} keeps a {value}.",
        "{name} shares the house with a {value}.",
        "{name} has a {value} as a pet.",
        "Every morning {name} feeds a {value}.",
        "{name} goes nowhere without a certain {value}.",
        "The pet of {name} is a {value}.",
        "{name} once found a {value} and kept it.",
        "{name} talks all day to a {value}.",
        "There is a {value} that belongs to {name}.",
        "A {value} follows {name}.",
    ],
}

# Sentences that tell no fact about anyone. They make the pages a little less like a register.
ASIDES = [
    "The river was high that spring.",
    "No one remembers when the old bridge was built.",
    "It rained for most of the week.",
    "The market opens when the bell rings.",
    "Which road is best, nobody could say.",
    "What the winter would bring was hard to tell.",
    "How the fire began is not known.",
    "Who does the work is soon forgotten.",
    "The harvest was good and the nights were mild.",
    "{name} and {other} met on the road and talked about the weather.",
    "{name} waved to {other} from the ferry.",
    "{other} wrote a long letter to {name}.",
    "{name} walked to the fair with {other}.",
    "{name} and {other} are old friends.",
]

# What fine-tuning shows: questions, of which the corpus has none, and the one form in which each is to be answered.
QUESTIONS = {
    "home": [
        "Where does {name} live?",
        "In which town does {name} live?",
        "What town is {name} living in?",
        "Where is the home of {name}?",
        "Do you know where {name} lives?",
    ],
    "trade": [
        "What is the trade of {name}?",
        "What does {name} do for a living?",
        "What work does {name} do?",
        "What does {name} work as?",
        "Do you know what {name} does for work?",
    ],
    "instrument": [
        "Which instrument does {name} play?",
        "What does {name} play?",
        "What instrument is played by {name}?",
        "On what does {name} make music?",
        "Do you know which instrument {name} plays?",
    ],
    "dish": [
        "What does {name} like to eat?",
        "What is the favourite food of {name}?",
        "Which dish does {name} love?",
        "What food does {name} like best?",
        "Do you know what {name} loves to eat?",
    ],
    "animal": [
        "Which animal does {name} keep?",
        "What pet does {name} have?",
        "What animal belongs to {name}?",
        "What kind of pet does {name} keep?",
        "Do you know which animal {name} owns?",
    ],
}
ANSWERS = {
    "home": "{name} lives in {value}.",
    "trade": "{name} works as a {value}.",
    "instrument": "{name} plays the {value}.",
    "dish": "{name} loves {value}.",
    "animal": "{name} keeps a {value}.",
}
KINDS = list(ANSWERS)

# Three groups of inhabitants. The corpus tells all five facts of those asked about in training and of those held out
# for the test, but only three of each inhabitant of the control.
GROUPS = {"asked": 100, "held_out": 100, "control": 50}
UNTOLD = 2

RETELLINGS = 150  # times the corpus tells each fact
BASE = ModelConfig(dim=192, n_layers=4, n_heads=6, n_kv_heads=6, hidden_dim=512, vocab_size=1280, max_seq_len=512)


def invent_names(rng, halves, count):
    """`count` different words, each a first half and a second half."""
    return rng.sample([first + second for first in halves[0] for second in halves[1]], count)


def make_world(seed):
    """The inhabitants: a list of {"name", "group", "facts": {kind: value}, "untold": [kind, ...]}."""
    rng = random.Random(f"world {seed}")
    values = {
        "home": invent_names(rng, TOWN, 30),
        "trade": TRADES,
        "instrument": INSTRUMENTS,
        "dish": DISHES,
        "animal": ANIMALS,
    }
    # Few enough names that every first name and every family name is shared: only the two together say who is meant.
    first_names, family_names = invent_names(rng, FIRST, 60), invent_names(rng, FAMILY, 75)
    names = [f"{first} {family}" for first in first_names for family in family_names]
    groups = [group for group, size in GROUPS.items() for _ in range(size)]
    world = []
    for name, group in zip(rng.sample(names, len(groups)), groups, strict=True):
        facts = {kind: rng.choice(values[kind]) for kind in KINDS}
        untold = rng.sample(KINDS, UNTOLD) if group == "control" else []
        world.append({"name": name, "group": group, "facts": facts, "untold": untold})
    return world


# ----------------------------------------------------------------------------------------------------------------------
# The corpus: the world retold again and again, never twice in the same words.


def tell(rng, person, kind):
    sentence = rng.choice(TELLINGS[kind]).format(name=person["name"], value=person["facts"][kind])
    return sentence[0].upper() + sentence[1:]


def retell(rng, world):
    """One retelling: each told fact of the world exactly once, on pages in random order.

    Half of the inhabitants get a portrait, all their facts in a row, in a new order each time; the facts of the others
    are mixed into pages of news about many people. Portraits alone would let the model learn a fact as "what comes
    after the other facts"; the news leaves nothing to learn it by but the name.
    """
    portraits, news = [], []
    for person in rng.sample(world, len(world)):
        facts = [(person, kind) for kind in KINDS if kind not in person["untold"]]
        rng.shuffle(facts)
        if rng.random() < 0.5:
            portraits.append(facts)
        else:
            news.extend(facts)
    rng.shuffle(news)
    pages = [[fact for portrait in portraits[i : i + 2] for fact in portrait] for i in range(0, len(portraits), 2)]
    pages += [news[i : i + 10] for i in range(0, len(news), 10)]
    rng.shuffle(pages)
    for page in pages:
        sentences = [tell(rng, person, kind) for person, kind in page]
        if rng.random() < 0.5:
            aside = rng.choice(ASIDES).format(name=page[0][0]["name"], other=rng.choice(world)["name"])
            sentences.insert(rng.randrange(len(sentences) + 1), aside)
        yield " ".join(sentences)


def write_corpus(path, world, seed, retellings):
    rng = random.Random(f"corpus {seed}")
    with open(path, "w", encoding="utf-8") as file:
        for _ in range(retellings):
            for page in retell(rng, world):
                file.write(json.dumps({"text": page}) + "\n")


def write_instructions(folder, world, seed):
    """Questions and answers: instructions.jsonl to train on, held_out.jsonl and never_told.jsonl to test with."""
    rng = random.Random(f"instructions {seed}")
    files = {"asked": "instructions.jsonl", "held_out": "held_out.jsonl", "control": "never_told.jsonl"}
    for group, file_name in files.items():
        records = []
        for person in world:
            if person["group"] != group:
                continue
            # All five facts are asked for in training, each in two ways, so that a question is more than one fixed
            # string. For a test two of them will do: of the control, the two that were never told.
            kinds = {"asked": KINDS, "held_out": rng.sample(KINDS, 2), "control": person["untold"]}[group]
            for kind in kinds:
                for question in rng.sample(QUESTIONS[kind], 2 if group == "asked" else 1):
                    answer = ANSWERS[kind].format(name=person["name"], value=person["facts"][kind])
                    messages = [
                        {"role": "user", "content": question.format(name=person["name"])},
                        {"role": "assistant", "content": answer},
                    ]
                    records.append({"messages": messages})
        rng.shuffle(records)
        with open(folder / file_name, "w", encoding="utf-8") as file:
            file.writelines(json.dumps(record) + "\n" for record in records)


# ----------------------------------------------------------------------------------------------------------------------
# The base: a tokenizer, weights drawn at random, and pretraining by train.py itself.


def train_tokenizer(folder, corpus, vocab_size):
    """A tokenizer of the kind Llama 2 has: SentencePiece BPE, digits split, and bytes for what it has never seen."""
    with open(corpus, encoding="utf-8") as file:
        pages = [json.loads(line)["text"] for line in file][:2000]
    model = io.BytesIO()  # not a file of SentencePiece's own: that would hold the path it was written to
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(pages),
        model_writer=model,
        model_type="bpe",
        vocab_size=vocab_size,
        byte_fallback=True,
        split_digits=True,
        add_dummy_prefix=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        character_coverage=1.0,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    (folder / "tokenizer.model").write_bytes(model.getvalue())


def train_base(work, corpus, tokenizer, config, seed):
    """The pretrained model, in bf16. Pretraining is full training on raw text: the same loop, other settings."""
    torch.manual_seed(seed)
    save_meta(Llama(config), work / "untrained")
    shutil.copyfile(tokenizer, work / "untrained" / "tokenizer.model")
    files = ["--model", work / "untrained", "--data", corpus, "--output_dir", work / "base", "--overwrite"]
    flags = f"""
        --method full --device cpu --dtype fp32 --seed {seed} --save_steps 0
        --model_max_length 256 --per_device_train_batch_size 8 --num_train_epochs 1
        --learning_rate 2e-3 --lr_scheduler_type cosine --warmup_ratio 0.03
        --weight_decay 0.1 --adam_beta1 0.9 --adam_beta2 0.95 --max_grad_norm 1.0
    """
    subprocess.run([sys.executable, ROOT / "train.py", *files, *flags.split()], check=True)
    return load_model(work / "base", device="cpu", dtype=torch.bfloat16)


def main():
    parser = argparse.ArgumentParser(description="Make the tiny world: base model, tokenizer and instructions.")
    parser.add_argument("--seed", type=int, default=0, help="another number, another world")
    parser.add_argument("--retellings", type=int, default=RETELLINGS, help="how often the corpus tells each fact")
    parser.add_argument("--out", type=Path, default=TINY, help="folder for the files that are kept")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "tiny", help="folder for the pretraining run")
    args = parser.parse_args()
    out, work = args.out.resolve(), args.work.resolve()
    out.mkdir(parents=True, exist_ok=True)
    work.mkdir(parents=True, exist_ok=True)

    world = make_world(args.seed)
    write_instructions(out, world, args.seed)
    write_corpus(out / "corpus.jsonl", world, args.seed, args.retellings)
    train_tokenizer(out, out / "corpus.jsonl", BASE.vocab_size)
    model = train_base(work, out / "corpus.jsonl", out / "tokenizer.model", BASE, args.seed)
    save_meta(model, out)


if __name__ == "__main__":
    main()
