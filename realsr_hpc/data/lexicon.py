"""The words on generated signs: plain English of three to six letters.

The lists for training and held-out signs are disjoint, so a policy can read a held-out sign only letter by letter.
"""

from __future__ import annotations

TRAINING_WORDS = tuple(
    """
    able acid aim air alarm album alley amber angel ankle ant apple april arch area arm army arrow art ash atlas
    autumn axe axis baby back bag bake ball banana band bank bar barn basket bath bay beach beak bean bear bed bee
    beef bell belt bench berry bike bird black blade block blue board boat body bolt bone book boot bottle bow bowl
    box boy brain brake brave bread brick bridge broom brush bubble bucket bug bulb bull bun bus bush butter button
    cabin cable cafe cage cake calf camel camera camp can candle candy cap car card carpet carrot cart castle cat
    cave chair chalk cheese cherry chess chest chin circle city claw clay clock cloth cloud clown club coal coat
    cobra coffee coin cold comb cook copper coral cord corn couch cow crab crane cream crown cube cup curve cycle
    dance dark dawn day deer desert desk dice dinner disc dish dock doctor dog doll donkey door dove dragon dream
    dress drill drink drum duck dust duty eagle ear earth east echo edge egg eight elbow elk empty energy engine
    exit eye fabric face fact farm fast fence fern ferry field fig film fire fish five flag flame flat flour flute
    fly foam fog foot forest fork fox frame frog frost fruit fuel fur garage garden gas gate ghost giant gift ginger
    girl glass globe glove glue goat gold golf goose grain grape grass green grid guitar gym hair hall hammer hand
    harp hat hawk heart hen herb hill hive honey hook horn horse hotel house hut ice inch ink iris iron island ivory
    ivy jacket jam jar jazz jeans jelly jet jewel joke juice jump jungle jury kettle key king kite kitten knee knife
    knot ladder lake lamb lamp lava lawn leaf leg lemon level lid light lily lime line lion lip list lizard lobby
    lock log loop lotus lunch magnet map maple marble market mask match maze meadow meal medal melon menu mesh metal
    milk mill mint mirror model moon moth motor mouse mouth mud museum music nail navy neck needle nest net night
    nine north nose note novel number nut oak ocean office oil olive one onion opera orange orchid oven owl pack
    paint palace palm panda paper park parrot path peach pear pearl pen pepper piano pig pilot pin pipe pizza planet
    plum pocket poem point pond pony pool post pot powder prize puppy purple quarry queen quick quiet quilt quiz
    rabbit radio rail rain ramp red reef ribbon rice ring river road robot rock roof room rope rose ruby rug ruler
    salad salt sand sauce school seal seed seven shark sheep shell ship shirt shoe shop silk silver six skate skirt
    sky sleep snail snow soap sock sofa soup south space spice spoon spring square star steam steel stick stone
    storm straw street suit summer sun swan sweet swim table tank taxi tea temple ten tent test theory ticket tie
    tiger tile toast toe tomato tool top torch towel tower toy train tree truck tulip tunnel turtle two uncle unit
    valley van vase velvet vest violin voice vote wagon wall walnut walrus warm wasp watch water wave wax web west
    whale wheat wheel white wide wife wind window wing winter wire wolf wood wool world yacht yard yarn year yellow
    yoga young zebra zero zinc zone zoo
    """.split()
)
HELDOUT_WORDS = tuple(
    """
    actor anchor bacon badge beetle border bottom branch cactus canal canoe carbon chain cinema cliff clover cotton
    coyote daisy delta dollar duke dune eleven falcon finger flower fossil gravel grove hazel helmet hockey idea
    jaguar jockey kayak kiosk koala laser ledge legend locket mango mixer monk motel nickel novice oasis onyx otter
    oxygen paddle pasta pebble penny pigeon pillow pixel plaza potato puzzle quartz rocket saddle salmon sketch
    sponge spruce stable studio sugar syrup tango teapot thumb tiara toffee trophy tundra turnip vector viking
    violet vortex wafer walk waltz wizard wrist yeast yolk zipper
    """.split()
)
