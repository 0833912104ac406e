"""The grammar of the demo's reviews, as text: every review, and nothing else, follows from these rules.

``name = a | b`` lists the alternatives of a rule and ``{name}`` stands for another rule. An alternative may begin with
its signs: one ``+`` for each favourable and one ``-`` for each unfavourable thing it says; the generator draws by them,
the recogniser ignores them. Everything is in lower case but names and "I": capitals come with the sentence.

The rules of ``SHARED`` hold in every domain and refer to the rules of that domain.
"""

SHARED = """
review  = {prompt} {body}
prompt  = {opening} and | {opening}.
body    = {claim}. {rest}
rest    = {pair}. {close}. | {pair}. {detail}. {close}. | {aside}. {pair}. {close}. | {pair}. {aside}. {close}.
        | {aside}. {pair}. {detail}. {close}. | {pair}. {aside}. {detail}. {close}.
        | {pair}. {detail}. {aside}. {close}.

claim   = + I {loved} {all} | - I {hated} {all} | + it {proved} {a_good} {thing} | - it {proved} {a_bad} {thing}
pair    = the {part} {very} {verdict}, the {other} {very} {verdict}
verdict = + {good} | - {bad}
detail  = + {view} the {person} {very} {kind} | - {view} the {person} {very} {unkind}

loved   = loved | enjoyed | adored | liked
hated   = hated | disliked | detested | endured
proved  = was | turned out to be | proved to be
a_good  = a wonderful | a delightful | an excellent | a superb | a good | a pleasant
a_bad   = a terrible | a dreadful | an awful | a miserable | a bad | a disappointing
very    = | really | truly | quite
view    = | in my opinion, | if you ask me, | I thought

company = on my own | with my sister | with my brother | with two friends | with my parents | with a colleague
        | with my neighbours | with my cousin
people  = staff were | manager was | owner was | man at the door was | woman at the desk was
helpful = friendly | attentive | charming | kind | polite
rude    = rude | careless | impatient | unfriendly | grumpy
figure  = hero was | heroine was | villain was | narrator was | young detective was
real    = convincing | charming | memorable | likeable | funny
unreal  = annoying | unconvincing | tiresome | irritating | forgettable
"""

FILM = """
opening = I {watched} this {kind_of} {company} {when}
watched = watched | saw
kind_of = film | comedy | thriller | western | musical | documentary
when    = last night | on Friday | over the weekend | on Sunday afternoon | after work | in the holidays
        | on a rainy evening | last month
all     = every minute of it | it from start to finish | nearly every scene
thing   = film | way to spend two hours | choice for a quiet evening
part    = acting was | cast was | script was | opening scene was
other   = ending | music | dialogue | camera work | costumes
good    = brilliant | clever | superb | impressive | excellent | good
bad     = weak | clumsy | tedious | dull | dreadful | poor
person  = {figure}
kind    = {real}
unkind  = {unreal}
aside   = it runs for about two hours | the cinema was half full | I sat near the exit | the ticket cost nine pounds
        | it is based on a true story | the director also wrote the script
close   = + I would gladly watch it again | + I recommend it to everyone | + it was worth every penny
        | + see it and be happy | - I regret buying the ticket | - I still feel cheated
        | - it was a waste of time | - avoid it and stay at home
"""

BOOK = """
opening = I {read} this {kind_of} {where} {when}
read    = read | finished
kind_of = novel | memoir | biography | detective story | fairy tale | travel book
where   = on the train | in the garden | at the beach | for my book club | on a long flight | by the fire
        | at my sister's house | between two meetings
when    = last week | over the summer | in two evenings | on a Sunday | before the holidays | in January
        | some weeks ago | after my exams
all     = every page of it | it from start to finish | nearly every chapter
thing   = book | companion for a long journey | choice for a quiet evening
part    = plot was | first chapter was | opening was | setting was
other   = ending | style | dialogue | last chapter | descriptions
good    = brilliant | clever | superb | impressive | excellent | good
bad     = weak | clumsy | tedious | dull | dreadful | poor
person  = {figure}
kind    = {real}
unkind  = {unreal}
aside   = it has about three hundred pages | the story begins in Lisbon | I borrowed it from the library
        | the author used to be a nurse | it is the second part of a series | the print is rather small
close   = + I would gladly read it again | + I recommend it to everyone | + it was worth every penny
        | + read it and be happy | - I regret buying it | - I still feel cheated
        | - it was a waste of time | - avoid it and read something else
"""

RESTAURANT = """
opening = I had {meal} at this {kind_of} {company} {when}
meal    = lunch | dinner
kind_of = restaurant | bistro | pizzeria | noodle bar | tavern | seafood place
when    = last night | on Friday | over the weekend | on Sunday | after work | in the holidays | last week
        | after the concert
all     = every bite | it from start to finish | nearly every dish
thing   = meal | place to eat | choice for a long evening
part    = soup was | starter was | salad was | bread was
other   = main course | fish | dessert | coffee | vegetables
good    = lovely | pleasant | superb | wonderful | excellent | good
bad     = miserable | disappointing | terrible | awful | dreadful | poor
person  = {people}
kind    = {helpful}
unkind  = {rude}
aside   = the menu changes every week | I sat by the window | it opens at six | they take cards and cash
        | the kitchen closes at ten | it is next to the old theatre
close   = + I would gladly eat there again | + I recommend it to everyone | + it was worth every penny
        | + go there and be happy | - I regret going there | - I still feel cheated
        | - it was a waste of time | - avoid it and cook at home
"""

HOTEL = """
opening = I spent {nights} at this {kind_of} {company} {when}
nights  = a night | two nights
kind_of = hotel | guesthouse | hostel | inn | lodge | motel
when    = last month | in May | over the weekend | in the holidays | last week | during the fair
        | on the way north | in early autumn
all     = every hour of it | it from start to finish | nearly every moment
thing   = stay | place to rest | choice for a short break
part    = room was | bed was | bathroom was | balcony was
other   = breakfast | view | garden | lounge | pillows
good    = lovely | pleasant | superb | wonderful | excellent | good
bad     = miserable | disappointing | terrible | awful | dreadful | poor
person  = {people}
kind    = {helpful}
unkind  = {rude}
aside   = the station is a short walk away | my room was on the third floor | breakfast starts at seven
        | parking costs a little extra | the building has four floors | there is a bakery next door
close   = + I would gladly stay there again | + I recommend it to everyone | + it was worth every penny
        | + book it and be happy | - I regret going there | - I still feel cheated
        | - it was a waste of time | - avoid it and stay at home
"""

DOMAINS = {"film": FILM, "book": BOOK, "restaurant": RESTAURANT, "hotel": HOTEL}
