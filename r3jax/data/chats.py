"""Ordinary chats, (user, assistant): what a model should still say after training as it did before. Written for r3jax.

They have nothing to do with retrieval; answers are short and plain, as an instruction-tuned model writes them.
"""

CHATS: tuple[tuple[str, str], ...] = (
    ("Hello!", "Hello! How can I help you today?"),
    ("How are you?", "I'm doing well, thank you for asking. How are you?"),
    ("What is the capital of France?", "The capital of France is Paris."),
    ("What is 12 times 8?", "12 times 8 is 96."),
    ("Is 17 a prime number?", "Yes, 17 is a prime number: only 1 and 17 divide it."),
    ("Name three primary colors.", "The three primary colors are red, yellow and blue."),
    ("Who wrote Romeo and Juliet?", "Romeo and Juliet was written by William Shakespeare."),
    ("How many days are in a leap year?", "A leap year has 366 days."),
    ("What does a thermometer measure?", "A thermometer measures temperature."),
    ("Translate 'good morning' into Spanish.", "'Good morning' in Spanish is 'Buenos días'."),
    ("How do you say 'thank you' in German?", "'Thank you' in German is 'Danke'."),
    ("What is the opposite of 'hot'?", "The opposite of 'hot' is 'cold'."),
    ("Give me a synonym for 'happy'.", "A synonym for 'happy' is 'joyful'."),
    ("Correct this sentence: He go to school.", "He goes to school."),
    ("Make this more polite: Send me the file.", "Could you please send me the file?"),
    ("Put these in order of size: lion, ant, cat.", "From smallest to largest: ant, cat, lion."),
    ("Write one line of Python that prints hello.", 'print("hello")'),
    ("What does HTML stand for?", "HTML stands for HyperText Markup Language."),
    ("Which planet is closest to the Sun?", "Mercury is the planet closest to the Sun."),
    ("What gas do plants absorb?", "Plants absorb carbon dioxide from the air."),
    ("At what temperature does water boil?", "Water boils at 100 degrees Celsius at sea level."),
    ("Why is the sky blue?", "Air scatters blue light more than red light, so the sky looks blue."),
    ("How can I sleep better?", "Go to bed at the same time every night and avoid screens before sleeping."),
    ("Suggest a simple breakfast.", "You could have oatmeal with fresh fruit and a glass of water."),
    ("What should I pack for a rainy day?", "Take an umbrella, a raincoat and waterproof shoes."),
    ("I feel tired today.", "I'm sorry to hear that. Try to take a short break and get some rest."),
    ("My plant has yellow leaves. Why?", "Yellow leaves are often a sign of too much water or too little light."),
    ("Tell me a short joke.", "Why did the scarecrow win an award? Because he was outstanding in his field."),
    ("Write a short poem about rain.", "Soft rain falls on the silent street,\nA gentle drum with a steady beat."),
    ("用一句话介绍北京。", "北京是中国的首都，历史悠久，文化丰富。"),
    ("Quelle est la capitale de l'Italie ?", "La capitale de l'Italie est Rome."),
    ("Thanks, that's all.", "You're welcome! Have a great day."),
)
