"""The words of the demo data set, separated by white space.

They are everyday words, so that a held-out word is new only to the adapter. There are many because the last
thing that a small model learns is to copy a word it was not trained on.
"""

from __future__ import annotations

WORDS = {
    "first_name": """
    Aaron Abigail Adrian Agnes Alan Albert Alice Amanda Amelia Amir Amy Andrea Andrew Angela Anna
    Anthony Arthur Astrid Audrey Barbara Beatrice Benjamin Bernard Bianca Boris Brenda Brian Bruno
    Camila Carla Carlos Caroline Cecilia Charles Charlotte Chloe Chris Clara Clement Colin Connor Cynthia
    Daniel Daphne David Deborah Dennis Diana Diego Dmitri Donna Dora Douglas Edgar Edith Edward Elena
    Eli Elsa Emily Emma Eric Esther Eva Evelyn Felix Fiona Frances Frank Freya Gabriel George Gloria
    Grace Greta Hannah Harold Harry Hassan Heather Hector Helen Henry Hugo Ian Ingrid Irene Iris Isaac
    Isabel Ivan Jacob James Janet Jasmine Jason Jean Jenny Jerome Joan Joel Jonas Jordan Joseph Judith
    Julia Karen Karl Kate Keith Kevin Kim Klaus Lara Laura Lena Leo Leonard Lewis Liam Lily Linda Lisa
    Louis Lucas Lucy Luke Lydia Magnus Malik Marco Margaret Maria Marion Mark Martha Martin Mary Matthew
    Maya Megan Mia Michael Milan Miriam Monica Nadia Naomi Nathan Nicole Nina Noah Nora Oliver Olivia
    Omar Oscar Patrick Paul Paula Peter Philip Quentin Rachel Ralph Rebecca Rita Robert Robin Roger Rosa
    Ruth Ryan Samuel Sandra Sarah Simon Sofia Sonia Stefan Stella Steven Susan Sylvia Tara Teresa Thomas
    Tina Toby Ursula Valerie Vera Victor Vincent Walter Wanda Wendy William Xavier Yara Yusuf Zoe
    """,
    "last_name": """
    Adams Allen Archer Atkins Bailey Baker Barnes Bennett Berger Bishop Blake Boyd Brooks Burton Butler
    Carter Castillo Chapman Clarke Coleman Collins Cooper Costa Cox Crawford Cruz Dawson Delgado Dixon
    Donovan Doyle Duncan Eaton Ellis Evans Farrell Ferguson Fisher Fleming Fletcher Foster Fox Franklin
    Gallagher Garcia Gibson Gilbert Gordon Graham Grant Griffin Hamilton Hansen Harper Harris Hayes
    Henderson Hoffman Holmes Hudson Hughes Jackson Jensen Johnson Keller Kennedy Knight Lambert Larsen
    Lawson Lopez Marshall Martinez Mason Meyer Miller Mitchell Moore Morales Morgan Murphy Nelson
    Nichols Novak Olsen Parker Patterson Perry Peterson Porter Powell Quinn Ramirez Reed Reynolds
    Richards Rivera Roberts Russell Sanders Schmidt Sharp Shaw Silva Simpson Spencer Stevens Sullivan
    Taylor Thompson Torres Tucker Turner Vargas Wagner Walker Wallace Watson Weaver Webb Wheeler Wright
    Young Ziegler
    """,
    "subject": """
    algebra archery astronomy ballet banjo baseball basketball biology botany boxing budget calligraphy
    carpentry cello ceramics chemistry chess choir climbing coding cooking cricket dance debate dentist
    design drama drawing driving economics embroidery engineering fencing film finance fishing fitness
    flute football gardening geography geometry golf grammar guitar gymnastics handball harp history
    hockey insurance jazz judo juggling karate knitting language law leadership literature magic
    marketing math medicine meditation music origami painting parenting photography physics piano
    pilates planning poetry pottery product programming project rowing rugby running sailing sales
    science sculpture sewing singing skating skiing soccer spelling statistics surfing swimming tennis
    theatre travel trumpet tutoring violin volleyball weaving weightlifting wrestling writing yoga
    """,
    "event": """
    appointment audition briefing call camp challenge class club competition conference contest course
    deadline demo dinner discussion event exam excursion exhibition fair festival final gathering
    hearing interview lecture lesson lunch match meeting meetup orientation panel party performance
    practice presentation quiz recital rehearsal retreat review seminar session show summit talk test
    tour tournament training trial trip tryout visit webinar workout workshop
    """,
    "adjective": """
    ancient antique basic big black blue bold brand-new brass bright broken bronze brown cheap clean
    clever cold colourful copper cosy cracked creamy crimson crisp curly cute damp dark deep delicate
    dented dirty dusty elegant empty enormous expensive faded famous fancy fast favourite fine flat
    folded fragile fresh frozen funny fuzzy gentle giant glass glossy golden gray green handmade hard
    heavy hidden hollow honest huge icy identical imported ivory large lazy leather light little local
    long loud lovely lucky magnetic massive metal mild mini missing modern muddy narrow nice noisy odd
    old orange organic oval pale paper perfect pink plain plastic polished portable precious pretty
    purple quick quiet rare ready-made red rough round royal rubber rusty salty scarlet second secret
    shiny short silent silk silver simple slim small smart smooth soft solid spare spicy square steel
    sticky stiff stone strange striped strong sturdy sweet tall tasty thick thin tidy tiny tough
    tropical ugly unusual useful velvet violet warm waterproof wet white wide wild wooden woollen yellow
    young
    """,
    # Each with a plural in -s.
    "noun": """
    airplane album almanac anchor apron armchair backpack badge badger bag ball balloon banner barrel
    basket bathtub bell belt bicycle blanket blazer blender boat bonnet book bookcase bookmark bottle
    bowl bracelet bread brick bridge broom bucket button cabbage cabinet cable cake camera candle canoe
    cape car card carpet carrot cart carton chain chair chart chisel clipboard clock coat coffee coin
    collar comb computer cookie crate crayon crown cucumber cup curtain cushion desk diamond doll door
    dragon drawer drill drum dumpling earring engine envelope eraser fan feather fence file flag
    flashlight fork frame freezer fridge funnel gate gift glove grill guidebook hairpin hammer hammock
    handle hat headphone heater helmet hook hose icicle instrument iron jacket jar jewel journal jug
    jumper kayak kettle keyboard kite label ladder lamp lantern laptop lemon letter lid lightbulb lock
    locker machine magnet mango map marble mask mat medal melon menu microphone microscope mirror mitten
    monitor motor muffin mug nail napkin necklace needle net noodle notebook notepad onion oven package
    paddle painting pan pancake parachute parcel passport pebble pen pencil pepper phone picture pillow
    pin pineapple pipe plate plug pocket postcard poster pot pretzel printer pump pumpkin puppet purse
    puzzle quilt racket radiator radio raincoat rake ribbon ring robot rocket rope rug ruler saddle
    sandal sausage saw scooter screen screw shawl sheet shelf shirt shoe shovel shutter sign sink skirt
    sled slipper soap sock sofa speaker sponge spoon stamp stapler statue stool stove suitcase sweater
    table tablet tape teacup teapot telescope tent ticket tie tile toaster tool towel tripod truck tube
    turnip umbrella uniform vacuum van vase vest waffle wagon wallet walnut wardrobe wheel whistle wig
    window wire zipper
    """,
    "state": """
    arriving available back blocked booked broken cancelled charged cheaper clean closed closing coming
    complete confirmed covered delayed delivered different done dry empty faulty finished fixed free
    full gone here important installed late leaking leaving locked lost missing moving nearby new open
    ordered outside over packed paid painted perfect postponed ready rented repaired replaced reserved
    returned safe scheduled shipped sold stolen stuck tested unlocked upstairs waiting working wrong
    """,
    "room_name": """
    acorn amber apple arctic aspen atlas aurora bamboo beacon beech birch cactus canyon cedar cherry
    chestnut cobalt comet coral cosmos cottage crystal cypress daisy delta desert dolphin eagle eclipse
    elm emerald falcon fern fjord forest galaxy garden garnet glacier granite harbour hazel heron
    hickory island jade jasmine juniper lagoon lake laurel lemon lilac linden lotus lunar magnolia mango
    maple marigold meadow mercury meteor mimosa mint mountain nebula neptune oak oasis ocean olive opal
    orchard orchid otter palm panda peach pearl penguin pine planet plum poplar poppy prairie quartz
    rainbow raven reef river robin ruby saffron sapphire saturn sequoia sparrow spruce summit sunflower
    sunset swan sycamore thistle tiger topaz tulip turquoise valley venus walnut willow zebra
    """,
    "room_kind": """
    annex arena atrium auditorium ballroom bay booth cabin chamber den gallery hall lab library lobby
    lodge loft lounge nook office parlour pavilion room salon space stage studio suite terrace theatre
    tower wing workshop
    """,
    "home_room": """
    attic balcony basement bathroom bedroom cellar closet conservatory corridor den entrance foyer
    garage greenhouse gym hallway kitchen landing laundry library lounge nursery office pantry playroom
    porch sauna shed stairway storeroom studio study sunroom veranda workroom
    """,
    "home_place": """
    back big blue brick central corner cosy downstairs east family front garden green grey guest inner
    large left little lower main master middle new north old outer private rear right shared side small
    south spare sunny top upper upstairs visitor west white yellow
    """,
    "title_word": """
    Afternoon Angel Autumn Avenue Bird Blossom Breeze Candle Carnival Castle Cathedral Circle City Cloud
    Coast Colour Corner Country Crossing Dawn Daylight Dream Dust Echo Ember Empire Evening Eye Farewell
    Feather Fever Field Fire Flame Flower Fog Fortune Fountain Friend Ghost Gravity Harvest Heart
    Highway Hill Home Horizon Horse Hour House Hurricane Island Journey Jungle King Kingdom Kiss Lantern
    Legend Letter Lightning Lion Magic Memory Midnight Mile Miracle Mirror Moment Monday Moon Morning
    Mountain Night Ocean Parade Paradise Path Phantom Pilot Pirate Poem Promise Queen Rain Rebel Rhythm
    River Road Rocket Rose Sailor Season Shadow Shore Signal Sky Smile Smoke Snow Soldier Song Spirit
    Spring Star Station Storm Story Stranger Street Summer Sun Sunday Thunder Tide Tiger Tomorrow Town
    Train Traveller Treasure Valley Voice Voyage Waltz Water Wave Whisper Wind Window Winter Wonder
    World
    """,
    "title_adjective": """
    Aching Bitter Blazing Blue Bright Broken Burning Careless Crazy Crystal Dancing Distant Drifting
    Electric Endless Eternal Fading Falling Fearless Final Flying Foolish Forgotten Fragile Frozen
    Gentle Golden Happy Haunted Hidden Holy Honest Humble Innocent Invisible Last Lonely Lost Lucky
    Magnetic Marble Mellow Misty Mystic Neon Nervous Northern Painted Patient Perfect Purple Quiet Rainy
    Reckless Restless Rising Rolling Running Sacred Scarlet Secret Shining Silent Silver Sleeping Slow
    Southern Starry Strange Sweet Tender Tired Velvet Wandering Western Whispering Wicked Wild Wooden
    """,
}
