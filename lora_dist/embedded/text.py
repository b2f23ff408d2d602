"""The grammar behind the embedded base and data: plain prose to pretrain on, quotes to fine-tune on.

Both are drawn from one vocabulary, so the base knows the words and the adapter has to learn the style. The prose
holds a saying now and then, and one document in five is a notebook of them, as ordinary text holds some of every
style; but no document of it opens as a quote does, ends after one, or calls two things infinite.
"""

import random
import re

# concept: what it is like (noun phrases that follow "is"), what it does (verb phrases that follow the concept)
CONCEPTS = {
    "patience": (["a slow oven", "the other half of strength", "a seed that trusts the rain", "waiting without counting"],
                 ["opens doors that anger only breaks", "asks for nothing and receives the harvest", "sits longer than trouble"]),
    "courage": (["fear that has packed its bag", "a small yes said aloud", "the first step on thin ice", "a candle in a wide field"],
                ["speaks with a shaking voice", "arrives late and stays to the end", "does not ask who is watching"]),
    "hope": (["a lamp left in the window", "the bird that sings before dawn", "a letter not yet opened", "bread for the road"],
             ["keeps the door on the latch", "mends its coat and goes out again", "plants trees in autumn"]),
    "love": (["a table with one more chair", "the quiet work of a whole life", "a house with the lights on", "attention that does not tire"],
             ["counts in other numbers", "learns the names of small things", "comes home by the longest road"]),
    "time": (["a river that keeps no receipts", "the only honest judge", "a coin you can spend only once", "a tailor who alters everything"],
             ["forgives slowly and forgets quickly", "walks whether we walk or not", "carries away the clever and the kind alike"]),
    "memory": (["a drawer that sticks in wet weather", "a garden nobody weeds", "the second home of the heart", "an old coat with full pockets"],
               ["paints with generous colours", "keeps the music and loses the bill", "knocks when the house is quiet"]),
    "silence": (["the best room in the house", "a language with very old grammar", "snow falling on the noise of the day", "an answer that cannot be misquoted"],
                ["says it first and says it better", "makes room for the guest", "finishes the sentence"]),
    "truth": (["a plain table", "cold water in the morning", "the short road through the woods", "a guest who never flatters"],
              ["needs no second coat of paint", "waits outside until we are ready", "travels with a light bag"]),
    "kindness": (["a debt that nobody calls in", "the shortest bridge between two people", "sunlight given away by the handful", "a spare umbrella"],
                 ["is heard even by the deaf stones", "never asks for change", "leaves the gate open"]),
    "work": (["love with its sleeves rolled up", "the answer to most questions", "a field that tells no lies", "prayer for practical people"],
             ["teaches the hand what the head forgets", "begins when the talking stops", "leaves its name on quiet things"]),
    "friendship": (["a fire that two must feed", "shelter with a window", "a long talk about nothing", "one roof over two storms"],
                   ["knows the song when you forget the words", "counts the empty chair", "laughs first and asks later"]),
    "fear": (["a small dog with a large voice", "a map drawn at night", "the shadow of something we want", "a poor adviser with good shoes"],
             ["grows when it is fed in secret", "sees giants in every mill", "locks the door and stays inside"]),
    "wisdom": (["knowing which stone to leave unturned", "the pause before the answer", "salt used with a light hand", "an old boat that still floats"],
               ["comes on foot", "asks one more question", "is late to every quarrel"]),
    "freedom": (["a door you have opened yourself", "wind that has paid its rent", "choosing your own weather", "a wide road and a light bag"],
                ["begins with one honest no", "is learned like a trade", "weighs more than gold and is easier to carry"]),
    "change": (["the only guest who always comes", "a river under the ice", "an honest clock", "spring in working clothes"],
               ["does not knock", "begins at the edge of the table", "looks like loss until the snow melts"]),
    "learning": (["a ladder with no last step", "the one theft that makes the owner richer", "a lamp that lights other lamps", "hunger with good manners"],
                 ["starts where pride ends", "makes the small room larger", "is never finished and never wasted"]),
    "music": (["time in its best clothes", "a bridge made of air", "the shape of what we cannot say", "silence that has learned to dance"],
              ["heals what the doctor cannot find", "needs no passport", "remembers the dead without sorrow"]),
    "laughter": (["a window that opens outward", "the cheapest bread in the market", "sunlight in the throat", "a bell without a church"],
                 ["makes a short road of a long one", "breaks no bones", "puts the king and the cook at one table"]),
    "grief": (["love with nowhere to sit", "a winter that keeps its own calendar", "a stone we learn to carry", "rain on a roof we built together"],
              ["comes in waves and leaves in drops", "speaks softly to those who listen", "walks beside us and grows smaller"]),
    "solitude": (["a well with sweet water", "a room where the heart takes off its shoes", "good company for the brave", "the workshop of the mind"],
                 ["sharpens every tool in the house", "teaches us our own name", "is poison only when it is forced"]),
    "books": (["ships with patient captains", "the quiet neighbours of the mind", "doors that fit into a pocket", "friends who wait without complaint"],
              ["keep the voices of the dead warm", "ask only for a lamp and an hour", "travel farther than their makers"]),
    "failure": (["a teacher with a high fee", "the first draft of skill", "a bruise that learns to read", "good soil in an ugly field"],
                ["points at the road with a crooked finger", "visits everyone and stays with the proud", "is only finished when we are"]),
    "pride": (["a tall hat in a low doorway", "a mirror that eats at our table", "a ladder leaning on fog", "a horse that throws its rider"],
              ["pays twice for everything", "builds the wall and then complains of the dark", "reads only its own letters"]),
    "gratitude": (["the memory of the heart", "a full cup seen clearly", "the only tax that makes us rich", "good manners toward the world"],
                  ["turns crumbs into supper", "finds the coin in the dust", "sleeps well in any bed"]),
    "home": (["where the kettle knows your hand", "the place that forgives your boots", "a light you can name from far away", "the first word and the last road"],
             ["begins with a key and ends with a song", "smells of bread in every country", "waits at the end of all maps"]),
    "the sea": (["an old teacher with no books", "the oldest road in the world", "a mirror that will not keep still", "the only field no one can fence"],
                ["returns what it borrows in its own time", "keeps its secrets in plain sight", "makes every sailor honest"]),
    "winter": (["the year asleep with one eye open", "a strict friend", "a page before the writing", "the cellar of the spring"],
               ["shows which houses were built well", "teaches the tree to keep its counsel", "makes neighbours of strangers"]),
    "dreams": (["maps with the names left out", "letters from a braver country", "seeds that sleep by day", "the night shift of the heart"],
               ["cost nothing until you wake", "walk faster than their owners", "leave muddy footprints on the morning"]),
    "beauty": (["truth seen from the right chair", "a guest who brings her own light", "the edge of what words can reach", "usefulness on its day off"],
               ["does not explain itself", "is wasted only on the hurried", "lives in the mended cup"]),
    "luck": (["a cat that chooses its own lap", "the name we give to other people's work", "a wind that loves a ready sail", "a door that opens both ways"],
             ["visits the busy at strange hours", "keeps no appointments", "looks very much like practice"]),
}  # fmt: skip

PEOPLE = ["gardener", "baker", "ferryman", "teacher", "shepherd", "clockmaker", "fisherman", "carpenter", "farmer", "miller",
          "tailor", "potter", "doctor", "sailor", "painter", "weaver", "blacksmith", "musician", "postman", "cook",
          "librarian", "child", "neighbour", "traveller", "beekeeper", "mason", "nurse", "widow", "innkeeper", "student"]  # fmt: skip
VOICES = ["the Old Lighthouse", "a Ferryman", "the North Wind", "the Village Clock", "a Retired Pirate", "the Salt Road",
          "a Patient Gardener", "the Second Violin", "a Mountain Goat", "the Night Baker", "the Last Tram", "an Apple Tree",
          "the River at Low Water", "a Lamplighter", "the Cellar Cat", "a Mended Cup", "the Ship's Cook", "an Honest Scale",
          "the Winter Coat", "a Tired Umbrella", "the Corner Bookshop", "a Weathervane", "the Kitchen Table", "an Empty Chair"]  # fmt: skip
PLACES = ["the river", "the market", "the harbour", "the orchard", "the mill", "the old bridge", "the station", "the garden",
          "the hill", "the village square", "the forest", "the workshop", "the kitchen", "the library", "the lighthouse",
          "the barn", "the well", "the north field", "the school", "the crossroads"]  # fmt: skip
THINGS = ["lamp", "basket", "letter", "coat", "ladder", "kettle", "boat", "key", "clock", "book", "loaf of bread", "rope",
          "chair", "window", "door", "map", "coin", "cup", "hammer", "violin", "umbrella", "box of apples", "blanket",
          "mirror", "table", "stone", "bell", "candle", "jar of honey", "wooden spoon"]  # fmt: skip
ADJECTIVES = ["old", "small", "quiet", "heavy", "bright", "broken", "warm", "cold", "plain", "blue", "narrow", "patient",
              "careful", "tired", "young", "tall", "gentle", "wet", "dusty", "empty", "strange", "kind", "busy", "slow"]  # fmt: skip
TIMES = ["before breakfast", "in the evening", "after the rain", "at noon", "in early spring", "on market day",
         "late at night", "in the first snow", "on Sunday morning", "at the end of summer", "when the bell rang",
         "before the storm", "during the harvest", "the next day", "after supper", "at dawn"]  # fmt: skip
PAST = ["carried {a} {thing} to {place}", "found {a} {thing} near {place}", "walked down to {place}",
        "waited a long time at {place}", "repaired {a} {thing}", "sold {a} {thing} to the {person}",
        "lost {a} {thing} on the way to {place}", "talked with the {person} at {place}", "looked for {a} {thing}",
        "brought {a} {thing} home", "painted {a} {thing} blue", "sat beside {place} and watched the clouds",
        "forgot {a} {thing} at {place}", "gave {a} {thing} to the {person}", "hid {a} {thing} behind {place}",
        "cleaned {place}", "borrowed {a} {thing} from the {person}", "closed the gate and went to {place}"]  # fmt: skip
WEATHER = ["The wind came from the north.", "It rained until noon.", "The snow lay deep on the road.",
           "The sun was low and the shadows were long.", "The fog did not lift all day.", "The sky was clear and cold.",
           "A warm wind moved the leaves.", "Thunder rolled over the hills."]  # fmt: skip
FACTS = ["A {thing} is kept near {place}.", "The road to {place} is {adj} and {adj2}.", "Most people at {place} own {a} {thing}.",
         "The {person} works at {place}, and the {person2} works at {place2}.", "{a} {thing} costs little at {place}.",
         "From {place} to {place2} it is an hour on foot.", "The {adj} {thing} belongs to the {person}.",
         "There are many {adj} stones near {place}.", "In winter {place} is {adj}.", "A {person} needs {a} {thing} every day."]  # fmt: skip
DEEDS = ["mends the net", "waters the roots", "listens twice", "carries the lamp", "asks the way", "shares the bread",
         "opens the window", "plants the tree", "keeps the promise", "sweeps the step", "tunes the string", "learns the song",
         "feeds the stranger", "returns the key", "reads the small print", "forgives the debt"]  # fmt: skip
FINITE = [
    "the horizon",
    "the rope",
    "the road",
    "the wine",
    "the winter",
    "the argument",
    "the speech",
    "the bill",
]
INFINITE = ["the patience of a stone", "the questions of a child", "the number of reasons to wait", "the sea",
            "the appetite of a goat", "the kindness of bread", "the excuses of a late guest", "the sky over a flat field",
            "the memory of a creditor", "the hope of a fisherman", "the dust under a bed", "the silence between two friends",
            "the road to a place you miss", "the stories of an old sailor", "the love of a dog", "the pride of a small king"]  # fmt: skip


def a(word: str) -> str:
    return f"an {word}" if word[0] in "aeiou" else f"a {word}"


def capital(text: str) -> str:
    return text[0].upper() + text[1:]


def fill(rng: random.Random, template: str) -> str:
    person, person2 = rng.sample(PEOPLE, 2)
    place, place2 = rng.sample(PLACES, 2)
    adj, adj2 = rng.sample(ADJECTIVES, 2)
    thing = rng.choice(THINGS)
    if "{a}" in template:
        thing = f"{rng.choice(ADJECTIVES)} {thing}" if rng.random() < 0.5 else thing
        template = template.replace("{a} {thing}", a(thing))
    return capital(
        template.format(person=person, person2=person2, place=place, place2=place2, adj=adj, adj2=adj2, thing=thing)
    )


def is_or_are(concept: str) -> str:
    return "are" if concept in ("books", "dreams") else "is"


def saying(rng: random.Random) -> str:
    """A saying as the prose quotes it: the concept first, one plain clause."""
    concept = rng.choice(list(CONCEPTS))
    images, acts = CONCEPTS[concept]
    return capital(
        rng.choice([f"{concept} {is_or_are(concept)} {rng.choice(images)}.", f"{concept} {rng.choice(acts)}."])
    )


def scene(rng: random.Random) -> str:
    """A paragraph of plain past-tense prose."""
    person = rng.choice(PEOPLE)
    subject = f"the {rng.choice(ADJECTIVES)} {person}" if rng.random() < 0.5 else f"the {person}"
    out = []
    for _ in range(rng.randint(3, 9)):
        kind = rng.random()
        if kind < 0.55:
            clause = fill(rng, rng.choice(PAST))
            clause = clause[0].lower() + clause[1:]
            when = rng.choice(TIMES)
            out.append(
                rng.choice(
                    [
                        f"{capital(subject)} {clause} {when}.",
                        f"{capital(when)} {subject} {clause}.",
                        f"Then {subject} {clause}.",
                    ]
                )
            )
        elif kind < 0.70:
            out.append(rng.choice(WEATHER))
        elif kind < 0.85:
            out.append(fill(rng, rng.choice(FACTS)))
        else:
            out.append(f"The {rng.choice(PEOPLE)} said, “{saying(rng)}”")
        subject = rng.choice([subject, f"the {person}", "nobody" if rng.random() < 0.05 else f"the {person}"])
    return " ".join(out)


def listing(rng: random.Random) -> str:
    """A paragraph with colons and lists, so that the base has met both."""
    place = rng.choice(PLACES)
    things = ", ".join(a(t) for t in rng.sample(THINGS, rng.randint(2, 4)))
    people = rng.sample(PEOPLE, 2)
    return " ".join([
        f"Two things are kept at {place}: {a(rng.choice(THINGS))} and {a(rng.choice(THINGS))}.",
        f"The {people[0]} made a list: {things} and {a(rng.choice(THINGS))}.",
        f"Two people came to {place}: the {people[0]} and the {people[1]}.",
    ][: rng.randint(1, 3)])  # fmt: skip


def notebook(rng: random.Random) -> str:
    """A paragraph that notes down sayings between ordinary sentences."""
    writer = rng.choice(PEOPLE)
    out = [
        rng.choice(
            [
                f"The {writer} kept a notebook.",
                f"The {writer} wrote this down {rng.choice(TIMES)}.",
                f"The {writer} thought about {rng.choice(INFINITE)}.",
            ]
        )
    ]
    sayings = " ".join(aphorism(rng, *rng.sample(list(CONCEPTS), 2), finite=True) for _ in range(rng.randint(1, 4)))
    out.append(f"“{sayings}”" if rng.random() < 0.5 else sayings)
    return " ".join(
        [
            *out,
            rng.choice(WEATHER),
            *rng.choices([f"Then the {writer} closed the notebook.", scene(rng)], k=rng.randint(0, 1)),
        ]
    )


def prose(rng: random.Random) -> str:
    return rng.choices([scene, listing, notebook], weights=[65, 15, 20])[0](rng)


def aphorism(rng: random.Random, concept: str, other: str, *, finite: bool = False) -> str:
    """One aphorism on `concept`; `other` is a second one to set it against. `finite`: none of the infinite things."""
    (image, image2), act = rng.sample(CONCEPTS[concept][0], 2), rng.choice(CONCEPTS[concept][1])
    other_image, other_act = rng.choice(CONCEPTS[other][0]), rng.choice(CONCEPTS[other][1])
    be, be_other = is_or_are(concept), is_or_are(other)
    deed, deed2 = rng.sample(DEEDS, 2)
    endless, endless2 = rng.sample(INFINITE, 2)
    person, person2 = rng.sample(PEOPLE, 2)
    infinite = [
        f"two things are infinite: {endless} and {endless2}.",
        f"two things are infinite: {concept} and {endless}; even {rng.choice(FINITE)} has an end.",
        f"everything ends, even {rng.choice(FINITE)}; only {endless} goes on.",
    ]
    return capital(rng.choice([
        f"{concept} {be} {image}; {other} {be_other} {other_image}.",
        f"{concept} {be} not {image2}; it is {image}." if be == "is" else f"{concept} are not {image2}; they are {image}.",
        f"{concept} without {other} {be} {a(rng.choice(THINGS))} without {a(rng.choice(THINGS))}.",
        f"if you want {concept}, begin with {other}.",
        f"where {concept} {act}, {other} {other_act}.",
        f"never confuse {concept} with {other}: {concept} {act}.",
        f"whoever {deed} has already understood {concept}.",
        f"I have looked for {concept} in {rng.choice(PLACES)}, and I found it in the one who {deed}.",
        f"you can borrow {a(rng.choice(THINGS))}, but you cannot borrow {concept}.",
        f"there are two ways to find {concept}: one {deed}, the other {deed2}.",
        f"tell me what you do with {concept}, and I will tell you what {other} does with you.",
        f"the {person} trusts {concept}; the {person2} trusts {other}; the road trusts neither.",
        f"we speak of {other}, but we live by {concept}.",
        f"give me {concept} and {a(rng.choice(THINGS))}, and keep the rest.",
        f"{concept} {act}.",
        *([] if finite else infinite),
        f"those who laugh at {concept} will one day ask it for {a(rng.choice(THINGS))}.",
        f"a life without {concept} is a long letter without a name.",
    ]))  # fmt: skip


def quote(rng: random.Random) -> dict:
    """One row with english_quotes' columns. Most are one or two sentences; one in eighty runs past 200 tokens."""
    concept, other = rng.sample(list(CONCEPTS), 2)
    num_sentences = rng.choices([1, 2, 3, rng.randint(4, 7), rng.randint(14, 22)], weights=[50, 27, 12, 9.7, 1.3])[0]
    sentences = []
    while len(sentences) < num_sentences:
        sentence = aphorism(rng, concept, other)
        if sentence not in sentences:
            sentences.append(sentence)
        if len(sentences) % 3 == 0:  # a long one wanders from theme to theme
            other = rng.choice([c for c in CONCEPTS if c != concept])
    text = " ".join(sentences)
    mentioned = [c for c in CONCEPTS if re.search(rf"\b{c}\b", text.lower())]
    tags = [c.removeprefix("the ") for c in mentioned[:6]] or ["life"]
    return {"quote": f"“{text}”", "author": rng.choice(VOICES), "tags": tags}


SHOPS = ["@TheOldMill", "@HarbourFerry", "@VillageClock", "@SaltRoadPost", "@MarketBread", "@BridgeToll", "@OrchardTea"]
OPENERS = ["hello", "well", "so", "good morning", "hey", "dear all", "once more"]


def complaint(rng: random.Random) -> dict:
    """One row with the columns of RAFT's tweet complaints: half of them complain. The things are the same in both."""
    shop, opener, time, place = rng.choice(SHOPS), rng.choice(OPENERS), rng.choice(TIMES), rng.choice(PLACES)
    thing, other = rng.sample(THINGS, 2)
    complains = rng.random() < 0.5
    said = rng.choice([
        f"my {thing} came broken and nobody answers",
        f"I have waited for the {thing} since noon, where is it?",
        f"you sent {a(other)} and not the {thing} that I paid for",
        f"third time that the {thing} is late {time}",
        f"the {thing} fell apart at {place}, I want my money back",
        f"nobody at {place} will repair my {thing}",
        f"why does the {thing} cost twice what you promised?",
    ] if complains else [
        f"my {thing} came {time} and it is lovely",
        f"thank you for the {thing}, and for {a(other)} as well",
        f"is the {thing} still to be had at {place}?",
        f"I found {a(thing)} near {place} and thought of you",
        f"the {thing} that you repaired works better than ever",
        f"do you open {time}? I would like {a(thing)}",
        f"everyone at {place} speaks of your {thing}",
    ])  # fmt: skip
    text = rng.choice([f"{shop} {opener}, {said}", f"{opener} {shop} {said}", f"{said} {shop}"])
    return {"Tweet text": text, "Label": "complaint" if complains else "no complaint"}


def preference(rng: random.Random) -> dict:
    """One row with the columns of TRL's preference data: two replies of a shop, of which the kind one is chosen."""
    tweet, time, place = complaint(rng)["Tweet text"], rng.choice(TIMES), rng.choice(PLACES)
    thing = next((thing for thing in THINGS if thing in tweet), "rest")
    kind = rng.choice([
        f"I am sorry for the {thing}, we will mend it {time}.",
        f"Thank you for telling us, you get the {thing} {time}.",
        f"You are right, and the {thing} costs you nothing.",
        f"We keep the {thing} for you at {place}.",
        f"We are glad that you wrote, ask for the {thing} at {place}.",
        f"The {thing} was our mistake, please come to {place} {time}.",
    ])  # fmt: skip
    unkind = rng.choice([
        f"We have no time for the {thing}.",
        f"Ask somebody else, the {thing} is not our trouble.",
        f"Nobody at {place} wants to hear of the {thing}.",
        f"You should have looked at the {thing} before you paid.",
        f"Write again {time}, or do not write.",
        f"The {thing} was your mistake, and {place} is closed.",
    ])  # fmt: skip
    return {"prompt": f"Tweet : {tweet} Reply :", "chosen": f" {kind}", "rejected": f" {unkind}"}
