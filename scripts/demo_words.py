"""The words and the fixed facts of the demo's small world: who lives in it, what things are called, what is true there.

Owns no sentences (demo_world.py writes them) and no tasks (demo_tasks.py sets them). Invariant: every entry is plain
lower-case ASCII, names aside, so that each word can be spelled letter by letter.
"""

PEOPLE = ("Tom", "Mia", "Ben", "Lily", "Sam", "Anna", "Max", "Zoe", "Leo", "Nora", "Jack", "Ella")
COLOURS = ("red", "blue", "green", "yellow", "black", "white", "brown", "pink", "grey", "gold")
SIZES = ("big", "small", "old", "new", "soft", "round", "warm", "cold", "bright", "heavy")
THINGS = (
    "ball", "book", "cup", "hat", "kite", "drum", "lamp", "box", "key", "coin", "bell", "boat", "doll", "coat", "bag",
    "ring", "rope", "spoon", "map", "shell", "stone", "basket", "ladder", "candle", "blanket",
)  # fmt: skip
PLACES = (
    "park", "garden", "house", "forest", "river", "market", "school", "kitchen", "barn", "hill", "bridge", "beach",
    "tower", "mill", "lake",
)  # fmt: skip
FEELINGS = ("happy", "sad", "tired", "proud", "brave", "hungry", "calm", "glad", "curious", "sleepy")
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")

# Animal: its home, its food, its sound.
ANIMALS = {
    "cow": ("barn", "grass", "moo"),
    "dog": ("house", "meat", "woof"),
    "cat": ("house", "fish", "meow"),
    "owl": ("tree", "mice", "hoot"),
    "duck": ("lake", "bread", "quack"),
    "frog": ("pond", "flies", "croak"),
    "horse": ("field", "hay", "neigh"),
    "sheep": ("hill", "grass", "baa"),
    "pig": ("barn", "corn", "oink"),
    "bee": ("hive", "honey", "buzz"),
    "wolf": ("forest", "meat", "howl"),
    "bear": ("cave", "berries", "growl"),
    "mouse": ("hole", "cheese", "squeak"),
    "hen": ("barn", "corn", "cluck"),
    "lion": ("grassland", "meat", "roar"),
    "goat": ("hill", "leaves", "maa"),
}

# Thing of nature: its colour.
NATURE = {
    "sky": "blue", "grass": "green", "snow": "white", "night": "black", "sun": "yellow", "blood": "red",
    "mud": "brown", "milk": "white", "coal": "black", "honey": "gold", "smoke": "grey", "corn": "yellow",
    "leaf": "green", "sea": "blue", "wood": "brown", "rose": "red", "sand": "gold", "cloud": "grey",
}  # fmt: skip

OPPOSITES = {
    "big": "small", "old": "new", "warm": "cold", "soft": "hard", "happy": "sad", "heavy": "light", "fast": "slow",
    "day": "night", "up": "down", "in": "out", "open": "closed", "full": "empty", "wet": "dry", "high": "low",
    "left": "right", "early": "late", "near": "far", "loud": "quiet", "thick": "thin", "long": "short",
}  # fmt: skip

# Person: work, tool, place.
WORKERS = {
    "baker": ("bread", "oven", "kitchen"),
    "farmer": ("corn", "plough", "field"),
    "fisher": ("fish", "net", "river"),
    "teacher": ("lessons", "chalk", "school"),
    "builder": ("houses", "hammer", "tower"),
    "tailor": ("coats", "needle", "shop"),
    "miller": ("flour", "stone", "mill"),
    "painter": ("pictures", "brush", "garden"),
    "sailor": ("knots", "rope", "boat"),
    "potter": ("cups", "clay", "market"),
}

# Words of the letter games: each is always quoted in a prompt, so the tokenizer hands it over letter by letter.
SPELLING_WORDS = (
    "ant", "arm", "bed", "bus", "cap", "car", "cow", "cup", "dog", "egg", "fan", "fig", "fox", "hat", "hen", "ice",
    "ink", "jam", "jar", "key", "leg", "lip", "map", "mud", "net", "nut", "owl", "pan", "pen", "pig", "pot", "rug",
    "sea", "sky", "sun", "tea", "toy", "van", "web", "yak", "zip", "ball", "barn", "bell", "bird", "boat", "bone",
    "book", "cake", "camp", "cave", "city", "clay", "coat", "coin", "corn", "desk", "dish", "door", "drum", "duck",
    "dust", "farm", "fish", "flag", "fork", "frog", "game", "gate", "gift", "girl", "glue", "goat", "gold", "hand",
    "harp", "hill", "home", "horn", "jump", "kite", "lake", "lamp", "leaf", "lion", "milk", "mint", "moon", "nest",
    "park", "path", "pear", "plum", "pond", "rain", "ring", "road", "rock", "roof", "rope", "rose", "salt", "sand",
    "seed", "ship", "shoe", "silk", "snow", "soap", "song", "star", "tent", "tree", "vase", "wind", "wolf", "wood",
    "apple", "beach", "berry", "bread", "brick", "brush", "cabin", "chair", "cloud", "clown", "crown", "dance",
    "earth", "field", "flute", "grape", "grass", "green", "heart", "honey", "horse", "house", "juice", "knife",
    "lemon", "light", "mango", "money", "mouse", "music", "night", "ocean", "olive", "paint", "paper", "peach",
    "piano", "plant", "plate", "queen", "river", "salad", "sheep", "shirt", "smile", "snake", "spoon", "stone",
    "storm", "sugar", "table", "tiger", "toast", "tower", "train", "truck", "water", "whale", "wheat", "world",
)  # fmt: skip
