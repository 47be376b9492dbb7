"""The small world that the demo model knows: names, places, words and fixed sayings."""

NAMES = (
    "Ada Alan Alice Amir Anna Ben Bob Carla Chen Clara Dan Dora Ella Emil Eva Felix Fred Grace Hana Hugo Ida Ivan "
    "Jack Jane Jonas Kim Lara Leo Lin Lucy Mara Max Mia Nina Noah Olga Omar Paul Rosa Sam Sara Tim Tom Vera Yuki "
    "Zoe"
).split()
COLOURS = "black blue brown gold green grey orange pink purple red silver white yellow".split()
CITIES = (
    "Amsterdam Athens Berlin Boston Cairo Dublin Geneva Hamburg Lima Lisbon London Madrid Oslo Paris Prague Rome "
    "Seoul Sydney Tokyo Toronto Vienna Warsaw Zurich"
).split()
ANIMALS = "bird cat cow dog fish fox frog goat horse mouse owl pig rabbit sheep snake turtle".split()
PET_NAMES = "Bella Biscuit Bruno Coco Daisy Felix Ginger Luna Milo Nala Oscar Pepper Rex Rocky Rusty Socks".split()
FOODS = "apples bananas beans bread cake carrots cheese cherries honey noodles olives pasta pizza rice soup tea".split()
JOBS = "artist baker cook doctor driver farmer gardener nurse painter pilot sailor singer teacher writer".split()
WORDS = (
    "apple arm ball bank bear bell boat bone book bottle box brick bridge brush bus button cake camera candle car "
    "card chair cloud coat coin cup desk door drum egg engine eye face farm feather field finger fire flag floor "
    "flower fork garden gate glass glove grass hammer hand hat heart hill horse house ice iron island jar key "
    "king kite knife ladder lake lamp leaf letter light lion map milk mirror moon mountain nail needle nest night "
    "nose ocean page paper pen pencil piano plane plant plate pocket queen radio rain ring river road rock rope "
    "rose sand school ship shirt shoe silk snow spoon spring star stone storm street sugar sun table tower train "
    "tree wall watch water wheel wind window wing winter wolf wood"
).split()
CAPITALS = {
    "Austria": "Vienna",
    "Egypt": "Cairo",
    "England": "London",
    "France": "Paris",
    "Germany": "Berlin",
    "Greece": "Athens",
    "Ireland": "Dublin",
    "Italy": "Rome",
    "Japan": "Tokyo",
    "Norway": "Oslo",
    "Peru": "Lima",
    "Poland": "Warsaw",
    "Portugal": "Lisbon",
    "Spain": "Madrid",
}
_ABILITIES = "I can remember what you tell me, count, repeat words, turn them around and tell a short story."
SMALL_TALK = {
    "Hello!": "Hello! How can I help you?",
    "Hello": "Hello! How can I help you?",
    "Hi": "Hello! How can I help you?",
    "Hi there!": "Hello! How can I help you?",
    "Good morning!": "Good morning! How can I help you?",
    "Good evening!": "Good evening! How can I help you?",
    "Who are you?": "I am a very small language model. I show that hybrid attention works.",
    "What are you?": "I am a very small language model. I show that hybrid attention works.",
    "What is your name?": "My name is Demo. I am a very small language model.",
    "How are you?": "I am fine, thank you. How can I help you?",
    "What can you do?": _ABILITIES,
    "Help": _ABILITIES,
    "Thank you!": "You are welcome!",
    "Thanks": "You are welcome!",
    "Goodbye!": "Goodbye! It was nice to talk to you.",
    "Bye": "Goodbye! It was nice to talk to you.",
    "Name the days of the week.": "Monday, Tuesday, Wednesday, Thursday, Friday, Saturday, Sunday.",
    "Name the months.": (
        "January, February, March, April, May, June, July, August, September, October, November, December."
    ),
    "Name the seasons.": "Spring, summer, autumn, winter.",
    "Say the alphabet.": "a b c d e f g h i j k l m n o p q r s t u v w x y z",
}
SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "You are a small and friendly assistant.",
    "Answer briefly.",
    "You are Demo, a very small language model.",
)
